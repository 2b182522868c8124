/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Both formats: what is staged goes from the ring to its shadow, and what was staged there from the shadow
 * to the ring. Values are copied as they are, so the ring's byte order does not matter.
 */
#include "ring_shadow.h"

#include <stdlib.h>
#include <string.h>

#include "chain_build.h"
#include "ring_impl.h"

struct ring_shadow {
	bool active;
	bool from_wrap; /* packed: the wrap counter at `from` */
	uint16_t from;	/* next to publish when the shadow took over */
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

	if (!s)
		return NULL;
	s->areas.desc = at + head;
	s->areas.avail = at + head + desc;
	s->areas.used = at + head + desc + avail;
	if (packed)
		((struct vring_packed_desc_event *)s->areas.avail)->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
	else
		((struct vring_avail *)s->areas.avail)->flags = VRING_AVAIL_F_NO_INTERRUPT;
	return s;
}

bool virtqueue_is_mapped(const struct virtqueue *vq)
{
	return !vq->shadow || !vq->shadow->active;
}

/* Used elements that the ring does not have, from one place to the other. */
static void split_copy(struct virtqueue *vq, uint16_t from, const struct vring_used *source,
		       struct vring_used *to)
{
	for (uint16_t i = from; i != vq->staged; i++)
		to->ring[i & (vq->num - 1)] = source->ring[i & (vq->num - 1)];
}

/* The flags of the first, and of the first that is not published yet, are for who publishes them. */
static void packed_copy(struct virtqueue *vq, uint16_t from, bool wrap,
			const struct vring_packed_desc *source, struct vring_packed_desc *to)
{
	uint32_t count = wrap == vq->staged_wrap ? (uint32_t)vq->staged - from :
						   vq->num - from + (uint32_t)vq->staged;
	uint16_t at = from;

	for (; count; count--) {
		to[at].id = source[at].id;
		to[at].len = source[at].len;
		if (at != from && at != vq->used)
			to[at].flags = source[at].flags;
		at = at + 1u < vq->num ? at + 1 : 0;
	}
}

void virtqueue_unmap(struct virtqueue *vq, uint64_t iova, uint32_t access)
{
	struct ring_shadow *s = vq->shadow;

	if (!s->active) {
		s->active = true;
		s->from = vq->used;
		s->from_wrap = vq->used_wrap;
		if (vq->is_packed)
			packed_copy(vq, s->from, s->from_wrap, vq->packed.desc, s->areas.desc);
		else
			split_copy(vq, s->from, vq->split.used, s->areas.used);
		virtqueue_set_memory(vq, vq->mem, &s->areas);
	}
	if (!vq->report.fault || vq->report.fault == VQ_MISS)
		vq_report(vq, VQ_MISS, 0, iova, access);
}

static void split_publish(struct virtqueue *vq, const struct ring_shadow *s)
{
	const struct vring_used *shadow = s->areas.used;

	split_copy(vq, s->from, shadow, vq->split.used);
	/* Pairs with the driver's acquire of used.idx: the elements are there. */
	if (vq->used != s->from)
		STORE_RELEASE(vq->split.used->idx, shadow->idx);
	/* What was read of the ring before may be another's. */
	vq->shadow_avail = vq->last_avail;
}

static void packed_publish(struct virtqueue *vq, const struct ring_shadow *s)
{
	const struct vring_packed_desc *shadow = s->areas.desc;

	packed_copy(vq, s->from, s->from_wrap, shadow, vq->packed.desc);
	/* Pairs with the driver's acquire of the flags: the elements behind it are there. */
	if (vq->used != s->from || vq->used_wrap != s->from_wrap)
		STORE_RELEASE(vq->packed.desc[s->from].flags, shadow[s->from].flags);
}

void virtqueue_map(struct virtqueue *vq, const struct virtqueue_areas *areas)
{
	struct ring_shadow *s = vq->shadow;

	if (!s->active)
		virtqueue_unmap(vq, 0, 0); /* it may have moved with what is staged in it */
	virtqueue_set_memory(vq, vq->mem, areas);
	if (vq->is_packed)
		packed_publish(vq, s);
	else
		split_publish(vq, s);
	s->active = false;
	virtqueue_retry(vq);
	/* Who was not signalled meanwhile, is now; and our own wish is there again. */
	vq->signalled_valid = false;
	if (vq->notify_off)
		virtqueue_disable_notification(vq);
	else
		virtqueue_enable_notification(vq);
}
