/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Memory that stands in for a device's ring while an IOMMU has it unmapped. The device goes on as if it
 * were the ring: nothing can be popped, and what is staged is staged here, to be copied and published once
 * the ring is back. So the functions that run for each chain need not know.
 */
#ifndef VHOST_RING_SHADOW_H
#define VHOST_RING_SHADOW_H

#include "virtqueue.h"

/* One piece of memory for free(), or NULL. */
struct ring_shadow *ring_shadow_new(uint32_t num, bool packed);

/* What is staged is to be published as soon as there is a ring. */
void ring_shadow_flush(struct virtqueue *vq);

#endif
