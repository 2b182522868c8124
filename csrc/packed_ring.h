/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Positions and flags of a packed ring, as its device counts and reads them (VIRTIO 1.2, 2.8.1). */
#ifndef VHOST_PACKED_RING_H
#define VHOST_PACKED_RING_H

#include "virtqueue.h"

#define AVAIL_USED (VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED)

static inline void advance(const struct virtqueue *vq, uint16_t *pos, bool *wrap, uint32_t slots)
{
	uint32_t next = *pos + slots;

	if (next >= vq->num) {
		next -= vq->num;
		*wrap = !*wrap;
	}
	*pos = (uint16_t)next;
}

/* Available is a slot whose AVAIL bit is the driver's wrap counter, and USED is not. */
static inline uint16_t available_flags(bool wrap)
{
	return wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED;
}

static inline bool is_available(uint16_t flags, bool wrap)
{
	return (flags & AVAIL_USED) == available_flags(wrap);
}

/* Used is one where both are the device's wrap counter. */
static inline uint16_t used_flags(bool wrap)
{
	return wrap ? AVAIL_USED : 0;
}

#endif
