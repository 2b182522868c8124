/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What both formats do to a chain that is given back before it is staged in the ring. Here, and not in
 * virtqueue.c, so that the format's staging is inlined into it.
 */
#ifndef VHOST_DEVICE_FILL_H
#define VHOST_DEVICE_FILL_H

#include <errno.h>

#include "inflight.h"

typedef void stage_fn(struct virtqueue *vq, uint16_t id, uint32_t written, uint16_t ndesc);

/*
 * Its id is free from here on: who offers it again before it was published harms nobody else. Its slots
 * stay in use until then, or a driver could make us stage more than the ring has.
 */
static inline __attribute__((always_inline)) void device_stage(struct virtqueue *vq, uint16_t id,
							       uint32_t written, stage_fn *stage)
{
	uint16_t ndesc = vq->slots[id].ndesc;

	vq->slots[id].ndesc = 0;
	if (unlikely(vq->inflight)) {
		if (vq->is_packed)
			inflight_packed_staged(vq, id, ndesc);
		else
			inflight_split_staged(vq, id);
	}
	stage(vq, id, written, ndesc);
	vq->staged_slots += ndesc;
}

static inline __attribute__((always_inline)) int device_fill(struct virtqueue *vq, uint16_t id,
							     uint32_t written, stage_fn *stage)
{
	struct vq_slot *slot = &vq->slots[id];

	if (unlikely(id >= vq->num || !slot->ndesc || slot->seq & VQ_SLOT_DONE))
		return -EINVAL;
	if (unlikely(written > slot->len))
		return -ERANGE;
	if (likely(!vq->in_order)) {
		device_stage(vq, id, written, stage);
		return 0;
	}
	/* 2.7.9: used in the order in which they were made available. */
	slot->len = written;
	slot->seq |= VQ_SLOT_DONE;
	while (vq->order_count) {
		uint16_t oldest = vq->order[vq->order_head];

		if (!(vq->slots[oldest].seq & VQ_SLOT_DONE))
			break;
		vq->order_head = vq->order_head + 1 < vq->num ? vq->order_head + 1 : 0;
		vq->order_count--;
		device_stage(vq, oldest, vq->slots[oldest].len, stage);
	}
	return 0;
}

/* One of a batch, in which each waits for no elder and nobody tracks. The ring slots of its chain, which is not
 * out from here on; 0: it cannot be given back like this. */
static inline __attribute__((always_inline)) uint16_t device_take_back(struct vq_slot *slots, uint32_t num,
								       struct virtqueue_used used)
{
	uint16_t ndesc;

	if (unlikely(used.id >= num))
		return 0;
	ndesc = slots[used.id].ndesc;
	if (unlikely(used.written > slots[used.id].len))
		return 0;
	slots[used.id].ndesc = 0;
	return ndesc;
}

/* What was staged is published. */
static inline void device_flushed(struct virtqueue *vq, uint32_t entries)
{
	vq->unsignalled += entries;
	vq->inuse -= vq->staged_slots;
	vq->staged_slots = 0;
}

#endif
