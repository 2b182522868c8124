/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A descriptor chain as a device sees it: every descriptor fetched once, checked, translated, and
 * laid out as iovecs, the device-readable ones first. Knows memory, not rings: device_split.c and
 * device_packed.c feed it descriptors, indirect tables included.
 */
#ifndef VHOST_CHAIN_H
#define VHOST_CHAIN_H

#include <stdint.h>
#include <sys/uio.h>

#include "guest_memory.h"

#define VHOST_CHAIN_INLINE 8u

struct vhost_chain {
	uint16_t id;    /* split: index of the head descriptor; packed: buffer id */
	uint16_t ndesc; /* ring slots that it occupies; an indirect table counts as 1 */
	uint32_t out_num; /* iovecs that the device may read ... */
	uint32_t in_num;  /* ... and, after them, those that it may write */
	uint32_t out_len; /* bytes of each kind; a chain has fewer than 2^32 (2.7.5.2) */
	uint32_t in_len;
	struct iovec *iov; /* out_num + in_num; points at `fixed` or at `spill` */
	struct iovec *spill; /* grown on demand, kept for the next chain, freed by _destroy */
	uint32_t spill_cap;
	struct iovec fixed[VHOST_CHAIN_INLINE];
};

void vhost_chain_init(struct vhost_chain *c);
void vhost_chain_destroy(struct vhost_chain *c);

#endif
