/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side of a split virtqueue (VIRTIO 1.2, 2.7). Knows the ring in shared memory and the
 * device's private state; knows neither who drives it nor how anybody is signalled. What is in the ring
 * goes through ring_order.h, for this file is compiled a second time, see there.
 */
#include <errno.h>

#include "chain_build.h"
#include "device_fill.h"
#include "device_pop.h"
#include "ring_impl.h"
#include "ring_order.h"
#include "virtqueue_log.h"

static inline uint16_t *used_event(const struct virtqueue *vq)
{
	return &vq->split.avail->ring[vq->num];
}

static inline uint16_t *avail_event(const struct virtqueue *vq)
{
	return (uint16_t *)&vq->split.used->ring[vq->num];
}

int split_init(struct virtqueue *vq, const struct virtqueue_config *cfg)
{
	if (cfg->base > UINT16_MAX)
		return -EINVAL;
	split_set_areas(vq, &cfg->areas);
	vq->last_avail = vq->shadow_avail = (uint16_t)cfg->base;
	vq->used = vq->staged = ring16(READ_ONCE(vq->split.used->idx));
	if (vq->inflight)
		return inflight_split_start(vq, ring16(READ_ONCE(vq->split.avail->idx)));
	return 0;
}

void split_set_areas(struct virtqueue *vq, const struct virtqueue_areas *areas)
{
	vq->split.desc = areas->desc;
	vq->split.avail = areas->avail;
	vq->split.used = areas->used;
}

/* Chains that are there: as last seen, or after a look if that is less than n. -1: broken. */
static inline int split_available(struct virtqueue *vq, unsigned n)
{
	uint16_t ahead = vq->shadow_avail - vq->last_avail, idx, now;

	if (ahead >= n)
		return ahead;
	/* Pairs with the driver's release of avail.idx: entries and descriptors are there. */
	idx = ring16(LOAD_ACQUIRE(vq->split.avail->idx));
	now = idx - vq->last_avail;
	if (unlikely(now > vq->num)) /* those seen before come first */
		return ahead ? ahead : vq_fault(vq, VQ_AVAIL_JUMP, 0, now, vq->num + 1);
	vq->shadow_avail = idx;
	return now;
}

/*
 * Takes descriptors from *d on for as long as they are buffers of this kind (0 or VRING_DESC_F_WRITE) and as
 * most are. 1: that was the whole chain; 0: *d is another; -1: broken. They are linked within `desc`, which is
 * the ring's or an indirect one (2.7.5.3), of `num` descriptors.
 */
static inline __attribute__((always_inline)) int take_run(struct virtqueue *vq, struct chain_walk *w,
							  const struct vring_desc *desc, uint32_t num,
							  uint16_t head, struct raw_desc *d, uint32_t kind)
{
	const struct guest_memory *mem = vq->mem;

	while ((raw_third(*d) & (VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE)) == kind &&
	       likely(chain_place(mem, w, *d))) {
		if (!(raw_third(*d) & VRING_DESC_F_NEXT))
			return 1;
		if (unlikely(raw_fourth(*d) >= num))
			return vq_fault(vq, VQ_NEXT_RANGE, head, raw_fourth(*d), num);
		*d = ring_desc(fetch_desc(&desc[raw_fourth(*d)]));
	}
	return 0;
}

/* Most chains are this: readable buffers, then writable ones. */
static inline __attribute__((always_inline)) int take_runs(struct virtqueue *vq, struct vhost_chain *c,
							   struct chain_walk *w,
							   const struct vring_desc *desc, uint32_t num,
							   uint16_t head, struct raw_desc *d)
{
	int rc = take_run(vq, w, desc, num, head, d, 0);

	chain_readable(c, w);
	return rc ? rc : take_run(vq, w, desc, num, head, d, VRING_DESC_F_WRITE);
}

/* A table comes after n direct buffers, mostly none, and ends the chain (2.7.5.3.2). 1 or -1, as split_take. */
static int take_table(struct virtqueue *vq, struct vhost_chain *c, uint32_t n, uint64_t len, uint16_t head,
		      uint32_t ndesc, struct raw_desc indirect)
{
	struct chain_walk w = chain_resume(vq, c, n, len);
	uint32_t entries = 0, i = 0, limit = chain_table_limit(vq);
	struct desc_table table;
	struct raw_desc d;

	if (chain_check_indirect(vq, head, raw_len(indirect), raw_third(indirect), &entries))
		return -1;
	table = desc_table(vq->mem, indirect.addr, raw_len(indirect));
	if (likely(table.host && !n)) {
		int rc;

		d = ring_desc(fetch_desc(table.host));
		rc = take_runs(vq, c, &w, (const struct vring_desc *)table.host, entries, head, &d);
		if (likely(rc))
			return rc < 0 ? rc : chain_out(vq, c, &w, head, ndesc);
	} else if (likely(fetch_table_desc(vq, &table, 0, &d))) {
		d = ring_desc(d);
	} else {
		return chain_no_access(vq, head, table.addr, sizeof(d), 0);
	}
	for (uint32_t seen = w.n - n + 1;; seen++) {
		if (unlikely(raw_third(d) & VRING_DESC_F_INDIRECT))
			return vq_fault(vq, VQ_INDIRECT_NESTED, head, raw_third(d), 0);
		if (unlikely(chain_add(vq, c, &w, head, d, raw_third(d))))
			return -1;
		if (!(raw_third(d) & VRING_DESC_F_NEXT))
			return chain_out(vq, c, &w, head, ndesc);
		i = raw_fourth(d);
		if (unlikely(i >= entries))
			return vq_fault(vq, VQ_NEXT_RANGE, head, i, entries);
		if (unlikely(seen == limit))
			return vq_fault(vq, VQ_CHAIN_TOO_LONG, head, seen + 1, limit + 1);
		if (unlikely(!fetch_table_desc(vq, &table, i, &d)))
			return chain_no_access(vq, head, table.addr + (uint64_t)i * sizeof(d), sizeof(d), 0);
		d = ring_desc(d);
	}
}

/* Goes on with a chain of n buffers so far at the next descriptor, one that not every chain has. 1 or -1.
 * (No chain_walk as an argument: the caller would have to keep his in memory for it.) */
static __attribute__((noinline)) int walk_on(struct virtqueue *vq, struct vhost_chain *c, uint32_t n,
					     uint64_t len, uint16_t head, struct raw_desc d)
{
	struct chain_walk w = chain_resume(vq, c, n, len);
	uint32_t ndesc = n + 1;

	for (;; ndesc++) {
		if (unlikely(ndesc > vq->num))
			return vq_fault(vq, VQ_CHAIN_TOO_LONG, head, ndesc, vq->num + 1);
		if (raw_third(d) & VRING_DESC_F_INDIRECT)
			return take_table(vq, c, w.n, w.len, head, ndesc, d);
		if (unlikely(chain_add(vq, c, &w, head, d, raw_third(d))))
			return -1;
		if (!(raw_third(d) & VRING_DESC_F_NEXT))
			return chain_out(vq, c, &w, head, ndesc);
		if (unlikely(raw_fourth(d) >= vq->num))
			return vq_fault(vq, VQ_NEXT_RANGE, head, raw_fourth(d), vq->num);
		d = ring_desc(fetch_desc(&vq->split.desc[raw_fourth(d)]));
	}
}

/* The chain with this head. 1 or -1. */
static inline __attribute__((always_inline)) int split_take(struct virtqueue *vq, struct vhost_chain *c,
							    uint16_t head)
{
	struct chain_walk w = chain_begin(vq, c);
	struct raw_desc d;
	int rc;

	if (unlikely(head >= vq->num))
		return vq_fault(vq, VQ_HEAD_RANGE, head, head, vq->num);
	if (unlikely(vq->slots[head].ndesc))
		return vq_fault(vq, VQ_HEAD_BUSY, head, head, 0);
	d = ring_desc(fetch_desc(&vq->split.desc[head]));
	rc = take_runs(vq, c, &w, vq->split.desc, vq->num, head, &d);
	if (likely(rc > 0))
		return chain_out(vq, c, &w, head, w.n);
	return rc ? rc : walk_on(vq, c, w.n, w.len, head, d);
}

static inline uint16_t next_head(const struct virtqueue *vq, uint16_t at)
{
	return ring16(READ_ONCE(vq->split.avail->ring[at & (vq->num - 1)]));
}

/* With in-flight tracking: what a predecessor left comes first. */
static int split_pop_tracked(struct virtqueue *vq, struct vhost_chain *c)
{
	struct inflight *in = vq->inflight;
	int rc;

	if (unlikely(in->old_popped < in->old_num)) {
		rc = split_take(vq, c, in->old[in->old_popped].at);
		if (rc > 0)
			inflight_popped_again(vq, c->id);
		return rc;
	}
	rc = split_available(vq, 1);
	if (rc <= 0)
		return rc;
	rc = split_take(vq, c, next_head(vq, vq->last_avail));
	if (rc > 0) {
		vq->last_avail++;
		inflight_split_popped(vq, c->id);
	}
	return rc;
}

int split_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n)
{
	uint16_t last = vq->last_avail;
	unsigned done;
	int ahead, rc = 0;

	if (unlikely(vq->inflight))
		return pop_each(vq, c, n, split_pop_tracked);
	ahead = split_available(vq, n);
	if (ahead <= 0)
		return ahead;
	if (n > (unsigned)ahead)
		n = (unsigned)ahead;
	for (done = 0; done < n; done++, last++) {
		rc = split_take(vq, c[done], next_head(vq, last));
		if (unlikely(rc < 0))
			break;
	}
	vq->last_avail = last;
	return likely(done) ? (int)done : rc;
}

void split_unpop(struct virtqueue *vq, uint16_t ndesc)
{
	(void)ndesc; /* one entry of the available ring, however long the chain */
	vq->last_avail--;
}

static inline void split_stage(struct virtqueue *vq, uint16_t id, uint32_t written, uint16_t ndesc)
{
	(void)ndesc;
	vq->split.used->ring[vq->staged & (vq->num - 1)] =
		(struct vring_used_elem){ ring32(id), ring32(written) };
	vq->staged++;
}

int split_fill(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	return device_fill(vq, id, written, split_stage);
}

unsigned split_fill_batch(struct virtqueue *vq, const struct virtqueue_used *used, unsigned n)
{
	struct vring_used_elem *ring = vq->split.used->ring;
	struct vq_slot *slots = vq->slots;
	uint16_t staged = vq->staged, mask = vq->num - 1;
	uint32_t num = vq->num, total = 0;
	unsigned i;

	for (i = 0; i < n; i++) {
		uint16_t ndesc = device_take_back(slots, num, used[i]);

		if (unlikely(!ndesc))
			break;
		ring[staged++ & mask] =
			(struct vring_used_elem){ ring32(used[i].id), ring32(used[i].written) };
		total += ndesc;
	}
	vq->staged = staged;
	vq->staged_slots += total;
	return i;
}

void split_flush(struct virtqueue *vq)
{
	uint16_t count = vq->staged - vq->used;

	if (!count)
		return;
	if (unlikely(vq->log))
		virtqueue_mark_elements(vq, vq->log->used + offsetof(struct vring_used, ring),
					sizeof(struct vring_used_elem), vq->used & (vq->num - 1), count);
	vq->used = vq->staged;
	/* Pairs with the driver's acquire of used.idx: the elements, and the data, are there. */
	STORE_RELEASE(vq->split.used->idx, ring16(vq->used));
	if (unlikely(vq->log))
		virtqueue_mark_used(vq, offsetof(struct vring_used, idx), sizeof(vq->used));
	if (unlikely(vq->inflight))
		inflight_split_published(vq);
	device_flushed(vq, count);
}

int split_push(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	int rc = device_fill(vq, id, written, split_stage);

	if (likely(!rc))
		split_flush(vq);
	return rc;
}

bool split_should_notify(struct virtqueue *vq)
{
	uint32_t count = vq->unsignalled;

	vq->unsignalled = 0;
	if (unlikely(!vq->signalled_valid)) {
		vq->signalled_valid = true;
		return true;
	}
	if (!count)
		return false;
	/* used.idx before the driver's wish; pairs with the barrier between the driver's change of
	 * its wish and its last look at used.idx. */
	FULL_BARRIER();
	if (!vq->event_idx)
		return !(ring16(READ_ONCE(vq->split.avail->flags)) & VRING_AVAIL_F_NO_INTERRUPT);
	/* 2.7.7.2; all 65536 events have passed where a count does not fit into 16 bits. */
	return count > UINT16_MAX ||
	       vring_need_event(ring16(READ_ONCE(*used_event(vq))), vq->used,
				(uint16_t)(vq->used - count));
}

/* Whether and when we want kicks was written to the used ring. */
static void mark_wish(struct virtqueue *vq)
{
	virtqueue_mark_used(vq,
			    vq->event_idx ? offsetof(struct vring_used, ring[vq->num]) :
					    offsetof(struct vring_used, flags),
			    sizeof(uint16_t));
}

void split_disable_notification(struct virtqueue *vq)
{
	/* With EVENT_IDX an event index that stays behind suppresses kicks by itself (2.7.10). */
	if (vq->event_idx)
		return;
	WRITE_ONCE(vq->split.used->flags, ring16(VRING_USED_F_NO_NOTIFY));
	if (unlikely(vq->log))
		mark_wish(vq);
}

bool split_enable_notification(struct virtqueue *vq)
{
	if (vq->event_idx)
		WRITE_ONCE(*avail_event(vq), ring16(vq->last_avail));
	else
		WRITE_ONCE(vq->split.used->flags, 0);
	if (unlikely(vq->log))
		mark_wish(vq);
	/* Our wish before the last look at avail.idx; pairs with the barrier between the driver's
	 * publishing and its reading of the wish. */
	FULL_BARRIER();
	return split_has_work(vq);
}

bool split_has_work(struct virtqueue *vq)
{
	return vq->shadow_avail != vq->last_avail ||
	       ring16(READ_ONCE(vq->split.avail->idx)) != vq->last_avail;
}

uint32_t split_base(const struct virtqueue *vq)
{
	return vq->last_avail;
}
