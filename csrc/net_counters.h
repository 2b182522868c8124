/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a network device's pair of queues counts. Each counter has one thread that writes, which is the pair's
 * worker if nothing else is said; anyone may read at any time.
 */
#ifndef VHOST_NET_COUNTERS_H
#define VHOST_NET_COUNTERS_H

#include <stdint.h>

#include "barrier.h"

/* Why a frame went nowhere. Of frames that the driver sent: */
enum net_drop {
	NET_PASSES,	   /* it was not dropped: counts nothing */
	NET_DROP_SHORT,	   /* fewer bytes than the header and an Ethernet header */
	NET_DROP_LONG,	   /* more than the MTU, or more than any frame has */
	NET_DROP_CSUM,	   /* to be checksummed outside of it, or without the feature */
	NET_DROP_GSO,	   /* to be segmented in a way that is none, or was not negotiated */
	NET_DROP_WIRE,	   /* what the device sends on did not take it */
	NET_DROP_DISABLED, /* its queue was disabled (the session's thread counts) */
	/* Of frames for the driver: */
	NET_DROP_STOPPED,  /* its receive queue is not there, or broken */
	NET_DROP_MTU,	   /* longer than its MTU allows, and not segmented */
	NET_DROP_NO_BUFFER,
	NET_DROP_NO_ROOM,  /* its buffers are too small */
	NET_DROP_BUFFER,   /* no frame: a receive buffer without room for the header, given back empty */
	NET_DROPS
};

/* A word for each but the first. Those of users' counters: dropped_WORD. */
extern const char *const net_drop_names[NET_DROPS];

struct net_counters {
	uint64_t tx_frames, tx_bytes; /* from the driver, without headers */
	uint64_t rx_frames, rx_bytes; /* to it */
	uint64_t dropped[NET_DROPS];
};

static inline void net_count(uint64_t *counter, uint64_t n)
{
	WRITE_ONCE(*counter, *counter + n);
}

#endif
