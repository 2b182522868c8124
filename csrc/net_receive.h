/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side of a receive queue: frames into the buffers that a driver made available, one or, with
 * MRG_RXBUF, as many as it takes (VIRTIO 1.2, 5.1.6.4). Knows rings and buffers; knows neither where frames
 * come from nor who else serves queues.
 *
 * Buffers are taken off the ring a batch ahead, and kept until there is a frame for them.
 */
#ifndef VHOST_NET_RECEIVE_H
#define VHOST_NET_RECEIVE_H

#include "engine.h"
#include "net_frame.h"

#define NET_BUFFERS_MAX 1024u /* of one frame, and taken ahead */

struct net_receiver {
	/* The owner's, before the queue is attached. */
	uint32_t hdr_len;
	uint32_t longest; /* of a frame that is not segmented, Ethernet header and tag included (5.1.4.1) */
	bool mergeable;
	struct net_offloads offloads; /* what the driver does itself */
	struct net_counters *counters;
	/* The worker's own. */
	struct engine_queue *queue; /* NULL: it is not there */
	bool starved;		    /* there was a frame, and no buffer: kicks are wanted */
	bool stuck;		    /* what its wire has does not fit into what is there, and nothing else will come */
	struct vhost_chain *chains; /* NET_BUFFERS_MAX, used as a circle */
	struct vhost_chain **at;    /* their addresses, for who takes a batch */
	uint32_t head, tail;	    /* free-running: buffers that were taken ahead lie between the two */
	uint32_t made;		    /* chains that were initialised: the first so many */
};

/* Everything but what is the owner's. 0 or -ENOMEM. */
int net_receiver_init(struct net_receiver *r);
void net_receiver_destroy(struct net_receiver *r);

/* In the worker's thread, when it gets the queue, and before it loses it. */
void net_receiver_open(struct net_receiver *r, struct engine_queue *queue);
void net_receiver_close(struct net_receiver *r);

/* Gives back to the ring what was taken ahead. */
void net_receiver_settle(struct net_receiver *r);

/* There is a queue, and it works. */
static inline bool net_receiver_is_open(const struct net_receiver *r)
{
	return r->queue && likely(!r->queue->failed);
}

/* Takes more buffers, so that there are `want` if the ring has as many: how many there are. */
uint32_t net_receiver_fetch(struct net_receiver *r, uint32_t want);

static inline uint32_t net_receiver_ahead(const struct net_receiver *r)
{
	return r->tail - r->head;
}

static inline struct vhost_chain *net_receiver_buffer(const struct net_receiver *r, uint32_t i)
{
	return r->at[(r->head + i) % NET_BUFFERS_MAX];
}

/* The first n buffers were filled with a frame of `len` bytes behind its header, all of them but the last to the
 * end: stages them. */
void net_receiver_used(struct net_receiver *r, uint32_t n, uint32_t len);

/* How many buffers the next frame of this length takes, header included, if there are so many: as many as that;
 * 0: there are too few, or they are too small (*why). Buffers that can hold no header are given back. */
uint32_t net_receiver_room(struct net_receiver *r, uint32_t len, enum net_drop *why);

/*
 * Copies frames to the driver, and publishes them. What each leaves to the receiver, the driver must be able
 * to do. How many are done with: one that no buffers of this driver hold is dropped, and counted. For the next
 * there are too few buffers, or there is no queue.
 */
unsigned net_receiver_put(struct net_receiver *r, const struct net_frame *frames, unsigned n);

/* The same, and what is left is dropped, too. */
void net_receiver_deliver(struct net_receiver *r, const struct net_frame *frames, unsigned n);

#endif
