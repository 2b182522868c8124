/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The data path of a network driver (VIRTIO 1.2, 5.1.6): bursts of frames through the rings of
 * virtqueue.h, in buffers that are laid out once. Knows frames, their header and slots in shared
 * memory; knows no features, no configuration space and no clock but for the pumps.
 *
 * A frame that is sent is one buffer with its header before it. Frames that come may be spread over
 * several (MRG_RXBUF). Nothing here allocates after init. Not thread safe: one thread at a time for
 * each direction.
 */
#ifndef VHOST_DRIVER_NET_H
#define VHOST_DRIVER_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio_net.h"
#include "virtqueue.h"

#define NET_SLOT_ALIGN 64u /* of a slot's address and size: its header is read in words */
#define NET_BURST 64u

/* `num` buffers of `size` bytes behind each other in shared memory: where we and the device see them. */
struct net_slots {
	uint8_t *host;
	uint64_t addr;
	uint32_t size, num;
};

/* ------------------------------------------------------------------ sending */

struct net_tx {
	struct driver_queue *dq;
	struct net_slots slots;
	uint32_t hdr_len;
	int kick;	/* eventfd, or -1 */
	uint16_t *free; /* a stack: the slot that was used last is the one still in the cache */
	uint32_t nfree;
};

struct net_out {
	const void *data;
	uint32_t len;
	const struct net_header *header; /* NULL: all zero. num_buffers is sent as 0 (5.1.6.2) */
};

/* 0, -EINVAL (a size, count or alignment that cannot be), -ENOMEM. Asks the device not to call. */
int net_tx_init(struct net_tx *tx, struct driver_queue *dq, const struct net_slots *slots,
		uint32_t hdr_len, int kick);
void net_tx_destroy(struct net_tx *tx);

static inline uint32_t net_tx_longest(const struct net_tx *tx)
{
	return tx->slots.size - tx->hdr_len;
}

/* Takes back what the device has sent. 0, or -EIO (broken). */
int net_tx_reap(struct net_tx *tx);

/* A burst in the making: chains of one buffer each. */
struct net_burst {
	struct virtqueue_buf bufs[NET_BURST];
	struct virtqueue_request reqs[NET_BURST];
	unsigned n;
};

/* Where the next frame of the burst goes, its header written; NULL: no slot is free, the burst is full,
 * or no frame has this length. Nothing is sent before net_tx_publish(), which kicks, too: 0, -EIO
 * (broken), or what the kick failed with. */
uint8_t *net_tx_stage(struct net_tx *tx, struct net_burst *burst, const struct net_header *header,
		      uint32_t len);
int net_tx_publish(struct net_tx *tx, struct net_burst *burst);

/* Copies frames into slots, makes them available together, kicks once: how many fitted. -EIO (broken),
 * -EMSGSIZE (the first frame is shorter than an Ethernet header or longer than net_tx_longest()), or
 * what the kick failed with. */
int net_tx_send(struct net_tx *tx, const struct net_out *frames, unsigned n);

/* ------------------------------------------------------------------ receiving */

enum net_fault { /* what the device did with one frame; the ring itself is well */
	NET_OK,
	NET_SHORT,   /* fewer bytes than header and Ethernet header */
	NET_LONG,    /* more bytes than the buffer has, or than are counted in 32 bits */
	NET_BUFFERS, /* num_buffers beyond what came with it, or beyond the ring */
	NET_CSUM,    /* the place of the checksum lies outside the frame */
};

const char *net_fault_text(enum net_fault fault);

struct net_part {
	uint16_t slot;
	uint32_t len;
};

struct net_rx {
	struct driver_queue *dq;
	struct net_slots slots;
	uint32_t hdr_len;
	bool mergeable;
	int kick;
	/* Buffers that came and were not given back yet, in their order; as many as the ring has. */
	struct net_part *parts;
	uint32_t nparts;
	/* Why the last call dropped a frame. One behind frames that were well is for the next call. */
	enum net_fault fault;
	uint64_t value, limit;
	bool pending;
	uint64_t dropped; /* frames that a fault cost */
};

struct net_in {
	struct net_header header; /* num_buffers: 0 with a legacy header */
	uint32_t first, nparts;	  /* in rx->parts; the header is the first hdr_len bytes */
	uint32_t len;		  /* of the frame alone */
};

int net_rx_init(struct net_rx *rx, struct driver_queue *dq, const struct net_slots *slots,
		uint32_t hdr_len, bool mergeable, int kick);
void net_rx_destroy(struct net_rx *rx);

/* Gives all slots to the device, for the first time; does not kick. 0, -EIO, or -EBUSY: it has some. */
int net_rx_fill(struct net_rx *rx);

/* Takes up to n frames, whose buffers are ours until net_rx_release(), which must come before the next
 * call: how many; -EIO (the ring is broken), -EBADMSG (rx->fault, value and limit say why a frame was
 * dropped; the next call goes on behind it). */
int net_rx_take(struct net_rx *rx, struct net_in *frames, unsigned n);

/* Copies a frame, without its header, to `to`: frame->len bytes. */
void net_rx_copy(const struct net_rx *rx, const struct net_in *frame, uint8_t *to);

/* Makes the buffers of all frames that were taken available again; kicks if there is need. 0, -EIO, or
 * what the kick failed with. */
int net_rx_release(struct net_rx *rx);

/* ------------------------------------------------------------------ pumps */

#define NET_SEQ 8u /* bytes of the sequence number in a frame, little-endian */

struct net_pump {
	const uint8_t *frame; /* what is sent, or expected */
	uint32_t len;
	int64_t seq_at;	   /* where its sequence number is; negative: none */
	uint64_t seq;	   /* the next one: to send, or expected */
	uint64_t count;	   /* frames to go; others do not count */
	uint64_t frames;   /* what was done */
	uint64_t lost;	   /* numbers that were passed over ... */
	uint64_t repeated; /* ... and numbers that came late, or again */
	uint64_t others;   /* received, but not this frame */
};

/* Send, or receive and compare, until `count` is 0 or CLOCK_MONOTONIC says `until` (ns). 0, -EIO,
 * -EBADMSG, or a system call's error; -EINTR: a signal came, go on after it was seen to. */
int net_tx_pump(struct net_tx *tx, struct net_pump *pump, int call, int64_t until);
int net_rx_pump(struct net_rx *rx, struct net_pump *pump, int call, int64_t until);

#endif
