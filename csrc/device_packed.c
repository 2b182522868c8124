/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side of a packed virtqueue (VIRTIO 1.2, 2.8). Knows the ring in shared memory and the
 * device's private state; knows neither who drives it nor how anybody is signalled.
 *
 * Used elements are written over descriptors that were popped before: as many slots further on as
 * their chain had descriptors (2.8.6). inuse keeps them behind what has been popped.
 */
#include <errno.h>

#include "chain_build.h"
#include "device_fill.h"
#include "device_pop.h"
#include "packed_ring.h"
#include "ring_impl.h"
#include "virtqueue_log.h"

int packed_init(struct virtqueue *vq, const struct virtqueue_config *cfg)
{
	uint16_t avail = cfg->base & 0xffff, used = cfg->base >> 16;

	if ((avail & 0x7fff) >= vq->num || (used & 0x7fff) >= vq->num)
		return -EINVAL;
	packed_set_areas(vq, &cfg->areas);
	vq->last_avail = avail & 0x7fff;
	vq->avail_wrap = avail >> 15;
	vq->used = vq->staged = used & 0x7fff;
	vq->used_wrap = vq->staged_wrap = used >> 15;
	return vq->inflight ? inflight_packed_start(vq) : 0;
}

void packed_set_areas(struct virtqueue *vq, const struct virtqueue_areas *areas)
{
	vq->packed.desc = areas->desc;
	vq->packed.driver = areas->avail;
	vq->packed.device = areas->used;
}

/* The chain before this position is whole. */
static inline __attribute__((always_inline)) int
take_whole(struct virtqueue *vq, struct vhost_chain *c, const struct chain_walk *w, uint16_t id,
	   uint32_t ndesc, uint16_t pos, bool wrap)
{
	if (unlikely(id >= vq->num))
		return vq_fault(vq, VQ_ID_RANGE, id, id, vq->num);
	if (unlikely(vq->slots[id].ndesc))
		return vq_fault(vq, VQ_ID_BUSY, id, id, 0);
	if (unlikely(chain_out(vq, c, w, id, ndesc) < 0))
		return -1;
	vq->last_avail = pos;
	vq->avail_wrap = wrap;
	return 1;
}

/* 2.8.7: the descriptors of a table lie behind each other, and a device ignores all flags of theirs but
 * WRITE: INDIRECT nests nothing, it is a buffer like the others. The table ends the chain. 1 or -1, as
 * packed_take. */
static int take_table(struct virtqueue *vq, struct vhost_chain *c, struct chain_walk w, uint32_t ndesc,
		      struct raw_desc indirect, uint16_t pos, bool wrap)
{
	uint32_t entries = 0, limit = chain_table_limit(vq);
	uint16_t id = indirect.third;
	struct desc_table table;

	if (chain_check_indirect(vq, id, indirect.len, indirect.fourth, &entries))
		return -1;
	if (unlikely(entries > limit))
		return vq_fault(vq, VQ_CHAIN_TOO_LONG, id, entries, limit + 1);
	table = desc_table(vq->mem, indirect.addr, indirect.len);
	for (uint32_t i = 0; i < entries; i++) {
		struct raw_desc d;

		if (unlikely(!fetch_table_desc(vq, &table, i, &d)))
			return chain_no_access(vq, id, table.addr + (uint64_t)i * sizeof(d),
					       sizeof(d), 0);
		if (unlikely(chain_add(vq, c, &w, id, d.addr, d.len, d.fourth)))
			return -1;
	}
	return take_whole(vq, c, &w, id, ndesc, pos, wrap);
}

/* 1, 0 or -1, as virtqueue_pop. */
static inline __attribute__((always_inline)) int packed_take(struct virtqueue *vq,
							     struct vhost_chain *c)
{
	uint32_t num = vq->num, left = num;
	uint16_t pos = vq->last_avail;
	bool wrap = vq->avail_wrap;
	/* Pairs with the driver's release of the head's flags: the whole chain is there. */
	uint16_t flags = LOAD_ACQUIRE(vq->packed.desc[pos].flags);
	struct chain_walk w;

	if (!is_available(flags, wrap))
		return 0;
	w = chain_begin(vq, c);
	for (;;) {
		struct raw_desc d = fetch_desc(&vq->packed.desc[pos]);

		d.fourth = flags; /* those that were looked at, whatever they are now */
		advance(vq, &pos, &wrap, 1);
		if (flags & VRING_DESC_F_INDIRECT)
			return take_table(vq, c, w, num - left + 1, d, pos, wrap);
		if (unlikely(chain_add(vq, c, &w, d.third, d.addr, d.len, flags)))
			return -1;
		if (!(flags & VRING_DESC_F_NEXT))
			/* The id is valid in the last descriptor (2.8.6). */
			return take_whole(vq, c, &w, d.third, num - left + 1, pos, wrap);
		if (unlikely(!--left))
			return vq_fault(vq, VQ_CHAIN_TOO_LONG, d.third, num + 1, num + 1);
		flags = READ_ONCE(vq->packed.desc[pos].flags);
		if (unlikely(!is_available(flags, wrap)))
			return vq_fault(vq, VQ_CHAIN_OPEN, d.third, pos, 0);
	}
}

/* A chain as the in-flight region has it: its slots may have been written over. It may lie as that of a
 * ring. */
static int packed_take_saved(struct virtqueue *vq, struct vhost_chain *c, uint16_t at)
{
	struct inflight *in = vq->inflight;
	uint32_t n = in->link[at].num;
	struct chain_walk w = chain_begin(vq, c);

	for (uint32_t i = 1;; i++, at = in->link[at].next) {
		const struct inflight_packed_desc *e = &in->packed->desc[at];
		struct raw_desc d = { READ_ONCE(e->addr), READ_ONCE(e->len), READ_ONCE(e->id),
				      READ_ONCE(e->flags) };

		if (unlikely(!(d.fourth & VRING_DESC_F_NEXT) != (i == n)))
			return vq_fault(vq, VQ_INFLIGHT_CHAIN, d.third, i, n);
		if (d.fourth & VRING_DESC_F_INDIRECT)
			return take_table(vq, c, w, n, d, vq->last_avail, vq->avail_wrap);
		if (unlikely(chain_add(vq, c, &w, d.third, d.addr, d.len, d.fourth)))
			return -1;
		if (i == n)
			return take_whole(vq, c, &w, d.third, n, vq->last_avail, vq->avail_wrap);
	}
}

/* With in-flight tracking: what a predecessor left comes first. */
static __attribute__((noinline)) int packed_pop_tracked(struct virtqueue *vq, struct vhost_chain *c)
{
	struct inflight *in = vq->inflight;
	uint16_t pos = vq->last_avail;
	int rc;

	if (unlikely(in->old_popped < in->old_num)) {
		rc = packed_take_saved(vq, c, in->old[in->old_popped].at);
		if (rc > 0)
			inflight_popped_again(vq, c->id);
		return rc;
	}
	rc = packed_take(vq, c);
	if (rc > 0)
		inflight_packed_popped(vq, c->id, c->ndesc, pos);
	return rc;
}

int packed_pop(struct virtqueue *vq, struct vhost_chain *c)
{
	if (unlikely(vq->inflight))
		return packed_pop_tracked(vq, c);
	return packed_take(vq, c);
}

int packed_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n)
{
	unsigned done = 0;

	if (unlikely(vq->inflight))
		return pop_each(vq, c, n, packed_pop_tracked);
	while (done < n) {
		int rc = packed_take(vq, c[done]);

		if (unlikely(rc < 0))
			return done ? (int)done : -1;
		if (!rc)
			break;
		done++;
	}
	return (int)done;
}

void packed_unpop(struct virtqueue *vq, uint16_t ndesc)
{
	if (vq->last_avail < ndesc) {
		vq->last_avail += vq->num;
		vq->avail_wrap = !vq->avail_wrap;
	}
	vq->last_avail -= ndesc;
}

static inline void packed_stage(struct virtqueue *vq, uint16_t id, uint32_t written, uint16_t ndesc)
{
	struct vring_packed_desc *d = &vq->packed.desc[vq->staged];
	uint16_t flags = used_flags(vq->staged_wrap);

	if (written)
		flags |= VRING_DESC_F_WRITE;
	d->id = id;
	d->len = written;
	/* The driver looks at elements in order: all but the first may be marked used already. */
	if (!vq->staged_slots)
		vq->first_flags = flags;
	else
		WRITE_ONCE(d->flags, flags);
	advance(vq, &vq->staged, &vq->staged_wrap, ndesc);
}

int packed_fill(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	return device_fill(vq, id, written, packed_stage);
}

/* Used elements were written from the next to publish on. */
static void mark_slots(struct virtqueue *vq, uint32_t count)
{
	virtqueue_mark_elements(vq, vq->log->desc, sizeof(struct vring_packed_desc), vq->used, count);
}

void packed_flush(struct virtqueue *vq)
{
	bool tracked = vq->inflight;

	if (!vq->staged_slots)
		return;
	if (unlikely(vq->log))
		mark_slots(vq, vq->staged_slots);
	if (unlikely(tracked))
		inflight_packed_publish(vq);
	/* Pairs with the driver's acquire of the flags: this element and all after it are there. */
	STORE_RELEASE(vq->packed.desc[vq->used].flags, vq->first_flags);
	if (unlikely(vq->log))
		mark_slots(vq, 1);
	vq->used = vq->staged;
	vq->used_wrap = vq->staged_wrap;
	if (unlikely(tracked))
		inflight_packed_published(vq);
	device_flushed(vq, vq->staged_slots);
}

bool packed_should_notify(struct virtqueue *vq)
{
	uint32_t count = vq->unsignalled;
	union {
		uint32_t word;
		struct vring_packed_desc_event event;
	} wish;
	uint16_t off;

	vq->unsignalled = 0;
	if (unlikely(!vq->signalled_valid)) {
		vq->signalled_valid = true;
		return true;
	}
	if (!count)
		return false;
	/* Used flags before the driver's wish; pairs with the barrier between the driver's change of
	 * its wish and its last look at the flags. */
	FULL_BARRIER();
	/* Both halves at once, so that they belong together. */
	wish.word = __atomic_load_n((uint32_t __attribute__((may_alias)) *)vq->packed.driver,
				    __ATOMIC_RELAXED);
	if (wish.event.flags == VRING_PACKED_EVENT_FLAG_DISABLE)
		return false;
	/* DESC without EVENT_IDX, and the reserved value, suppress nothing; and more than a lap has
	 * passed every position there is. */
	if (wish.event.flags != VRING_PACKED_EVENT_FLAG_DESC || !vq->event_idx || count > vq->num)
		return true;
	off = wish.event.off_wrap & ~VRING_PACKED_EVENT_WRAP;
	if ((wish.event.off_wrap >> 15) != vq->used_wrap)
		off -= (uint16_t)vq->num;
	return vring_need_event(off, vq->used, (uint16_t)(vq->used - count));
}

void packed_disable_notification(struct virtqueue *vq)
{
	WRITE_ONCE(vq->packed.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
	if (unlikely(vq->log))
		virtqueue_mark_used(vq, 0, sizeof(*vq->packed.device));
}

bool packed_enable_notification(struct virtqueue *vq)
{
	if (vq->event_idx) {
		WRITE_ONCE(vq->packed.device->off_wrap,
			   (uint16_t)(vq->last_avail | (vq->avail_wrap << 15)));
		/* Pairs with the driver's acquire of the flags: off_wrap is valid. */
		STORE_RELEASE(vq->packed.device->flags, VRING_PACKED_EVENT_FLAG_DESC);
	} else {
		WRITE_ONCE(vq->packed.device->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
	}
	if (unlikely(vq->log))
		virtqueue_mark_used(vq, 0, sizeof(*vq->packed.device));
	/* Our wish before the last look; pairs with the barrier between the driver's publishing and
	 * its reading of the wish. */
	FULL_BARRIER();
	return packed_has_work(vq);
}

bool packed_has_work(struct virtqueue *vq)
{
	return is_available(READ_ONCE(vq->packed.desc[vq->last_avail].flags), vq->avail_wrap);
}

uint32_t packed_base(const struct virtqueue *vq)
{
	uint32_t avail = vq->last_avail | (uint32_t)vq->avail_wrap << 15;
	uint32_t used = vq->used | (uint32_t)vq->used_wrap << 15;

	return avail | used << 16;
}
