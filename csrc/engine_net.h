/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The data queues of a network device, served by an engine's workers: what is between the rings and a wire
 * (net_wire.h). Both queues of a pair belong to the same worker.
 */
#ifndef VHOST_ENGINE_NET_H
#define VHOST_ENGINE_NET_H

#include "engine.h"
#include "net_wire.h"

struct net_queue {
	struct engine_queue engine; /* first: its operations find the rest */
	struct net_pair *pair; /* the owner's, until the queue is detached */
};

/* A frame for the driver of a receive queue that is attached, from any thread. It is dropped if there is no room. */
void net_queue_deliver(struct net_queue *q, const void *frame, uint32_t len);

extern const struct engine_ops net_transmit_ops, net_receive_ops;

#endif
