/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Values are copied as they are, so the ring's byte order does not matter. */
#include "ring_shadow.h"

#include <stdlib.h>

#include "chain_build.h"
#include "virtqueue_log.h"

struct ring_shadow {
	bool active;
	uint32_t flushed; /* slots that were staged when it was last asked for */
	struct virtqueue_areas areas;
};

/* Descriptors are the largest that has to be aligned. */
static size_t rounded(size_t size)
{
	return (size + VRING_DESC_ALIGN - 1) & ~(size_t)(VRING_DESC_ALIGN - 1);
}

struct ring_shadow *ring_shadow_new(uint32_t num, bool packed)
{
	size_t head = rounded(sizeof(struct ring_shadow)), desc = rounded(vring_desc_size(num));
	size_t avail = rounded(vring_driver_size(num, packed));
	uint8_t *at = calloc(1, head + desc + avail + vring_device_size(num, packed));
	struct ring_shadow *s = (void *)at;

	if (s)
		s->areas = (struct virtqueue_areas){ at + head, at + head + desc, at + head + desc + avail };
	return s;
}

bool virtqueue_is_mapped(const struct virtqueue *vq)
{
	return !vq->shadow || !vq->shadow->active;
}

void ring_shadow_flush(struct virtqueue *vq)
{
	vq->shadow->flushed = vq->staged_slots;
}

/* Used elements that are staged, from one place to the other. */
static void copy_split(const struct virtqueue *vq, const struct vring_used *from, struct vring_used *to)
{
	for (uint16_t i = vq->used; i != vq->staged; i++)
		to->ring[i & (vq->num - 1)] = from->ring[i & (vq->num - 1)];
}

/* Into the shadow come all slots: one behind a used element is to be given back as the driver left it, for
 * either side would believe its flags in a later lap. Those of the first are in vq->first_flags until it is
 * published. */
static void copy_packed(const struct virtqueue *vq, const struct vring_packed_desc *from,
			struct vring_packed_desc *to)
{
	uint32_t at = vq->used, count = to == vq->shadow->areas.desc ? vq->num : vq->staged_slots;

	for (uint32_t i = 0; i < count; i++) {
		to[at].id = from[at].id;
		to[at].len = from[at].len;
		if (i)
			to[at].flags = from[at].flags;
		at = at + 1 < vq->num ? at + 1 : 0;
	}
}

static void move_to(struct virtqueue *vq, const struct virtqueue_areas *areas)
{
	if (vq->is_packed)
		copy_packed(vq, vq->packed.desc, areas->desc);
	else
		copy_split(vq, vq->split.used, areas->used);
	virtqueue_set_memory(vq, vq->mem, areas);
}

void virtqueue_unmap(struct virtqueue *vq, uint64_t iova, uint32_t access)
{
	struct ring_shadow *s = vq->shadow;

	if (!s->active) {
		s->active = true;
		s->flushed = 0;
		move_to(vq, &s->areas);
	}
	if (!vq->report.fault || vq->report.fault == VQ_MISS)
		vq_report(vq, VQ_MISS, 0, iova, access);
}

void virtqueue_map(struct virtqueue *vq, const struct virtqueue_areas *areas)
{
	struct ring_shadow *s = vq->shadow;
	uint32_t flushed = s->active ? s->flushed : 0;

	move_to(vq, areas);
	s->active = false;
	virtqueue_retry(vq);
	/* What was read of it before may be another ring's. */
	if (!vq->is_packed)
		vq->shadow_avail = vq->last_avail;
	/* Where the pages to mark are; if that fails, whoever logs is told when it is set again. */
	if (vq->log)
		virtqueue_set_log(vq, vq->log);
	/* Who staged more since then has yet to flush, and all goes out together. */
	if (flushed && flushed == vq->staged_slots)
		virtqueue_flush(vq);
	if (vq->notify_off)
		virtqueue_disable_notification(vq);
	else
		virtqueue_enable_notification(vq);
}
