/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a pair of queues of a network device is connected to. Each wire takes the frames that the driver
 * sent, and may have some for it. All of it runs in the thread of the worker that has the pair, and a wire
 * that leads to another pair needs that one on the same worker: there is no lock.
 */
#ifndef VHOST_NET_WIRE_H
#define VHOST_NET_WIRE_H

#include "net_receive.h"

struct net_input; /* net_fd.h */
struct net_pair;

struct net_wire_ops {
	/* Frames that the driver sent, at most ENGINE_BATCH; they were checked, and may be changed. */
	void (*send)(struct net_pair *p, struct net_frame *frames, unsigned n);
	/* Gives the driver a batch, if there are frames, and a receive queue: true if there was work. NULL: they
	 * only come from others. */
	bool (*receive)(struct net_pair *p);
};

struct net_pair {
	/* The owner's; to be changed only while none of the pair's queues is attached. */
	const struct net_wire_ops *wire;
	struct net_frame_rules rules;
	struct net_receiver rx;
	struct net_pair *peer; /* whose receive queue gets what is sent; its owner may not be ours */
	struct net_pair *next; /* another of the same owner and worker, in a circle: in its place if it has none */
	const uint8_t *source; /* the frame that comes again and again */
	uint32_t source_len;
	struct net_input *input; /* a descriptor, and what was read from it */
	/* The worker's. */
	struct net_counters counters;
	uint8_t *scratch; /* NET_FRAME_MAX bytes, for a frame that is worked on */
};

/* 0 or -ENOMEM; of what is the owner's, nothing is set. */
int net_pair_init(struct net_pair *p);
void net_pair_destroy(struct net_pair *p);

extern const struct net_wire_ops net_wire_drop, net_wire_peer, net_wire_source;

#endif
