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

/* May a chain have this id? 0 or -1. */
static inline int check_id(struct virtqueue *vq, uint16_t id)
{
	if (unlikely(id >= vq->num))
		return vq_fault(vq, VQ_ID_RANGE, id, id, vq->num);
	if (unlikely(vq->slots[id].ndesc))
		return vq_fault(vq, VQ_ID_BUSY, id, id, 0);
	return 0;
}

/* The chain before this position is whole. */
static inline int take_whole(struct virtqueue *vq, struct vhost_chain *c, const struct chain_walk *w,
			     uint16_t id, uint32_t ndesc, uint16_t pos, bool wrap)
{
	if (unlikely(check_id(vq, id) || chain_out(vq, c, w, id, ndesc) < 0))
		return -1;
	vq->last_avail = pos;
	vq->avail_wrap = wrap;
	return 1;
}

/* 2.8.7: the descriptors of a table lie behind each other, and a device ignores all flags of theirs but
 * WRITE: INDIRECT nests nothing, it is a buffer like the others. The table ends the chain. 1 or -1, as
 * packed_take. */
static int take_table(struct virtqueue *vq, struct vhost_chain *c, uint32_t n, uint64_t len, uint32_t ndesc,
		      struct raw_desc indirect, uint16_t flags, uint16_t pos, bool wrap)
{
	struct chain_walk w = chain_resume(vq, c, n, len);
	uint32_t entries = 0, limit = chain_table_limit(vq);
	uint16_t id = raw_third(indirect);
	struct desc_table table;

	if (chain_check_indirect(vq, id, raw_len(indirect), flags, &entries))
		return -1;
	if (unlikely(entries > limit))
		return vq_fault(vq, VQ_CHAIN_TOO_LONG, id, entries, limit + 1);
	table = desc_table(vq->mem, indirect.addr, raw_len(indirect));
	for (uint32_t i = 0; i < entries; i++) {
		struct raw_desc d;

		if (unlikely(!fetch_table_desc(vq, &table, i, &d)))
			return chain_no_access(vq, id, table.addr + (uint64_t)i * sizeof(d),
					       sizeof(d), 0);
		if (unlikely(chain_add(vq, c, &w, id, d, raw_fourth(d))))
			return -1;
	}
	return take_whole(vq, c, &w, id, ndesc, pos, wrap);
}

/* After ndesc descriptors the chain is to go on in a slot that is not available. */
static int goes_nowhere(struct virtqueue *vq, uint16_t id, uint32_t ndesc, uint32_t pos)
{
	if (ndesc >= vq->num)
		return vq_fault(vq, VQ_CHAIN_TOO_LONG, id, ndesc + 1, vq->num + 1);
	return vq_fault(vq, VQ_CHAIN_OPEN, id, pos, 0);
}

/* Goes on with a chain of n buffers so far at the next descriptor, one that not every chain has, at `pos`.
 * 1 or -1. (No chain_walk as an argument: the caller would have to keep his in memory for it.) */
static __attribute__((noinline)) int walk_on(struct virtqueue *vq, struct vhost_chain *c,
					     uint32_t n, uint64_t len, struct raw_desc d,
					     uint16_t flags, uint16_t pos, bool wrap)
{
	struct chain_walk w = chain_resume(vq, c, n, len);

	for (uint32_t ndesc = n + 1;; ndesc++) {
		if (unlikely(ndesc > vq->num))
			return vq_fault(vq, VQ_CHAIN_TOO_LONG, raw_third(d), ndesc, vq->num + 1);
		advance(vq, &pos, &wrap, 1);
		if (flags & VRING_DESC_F_INDIRECT)
			return take_table(vq, c, w.n, w.len, ndesc, d, flags, pos, wrap);
		if (unlikely(chain_add(vq, c, &w, raw_third(d), d, flags)))
			return -1;
		if (!(flags & VRING_DESC_F_NEXT))
			return take_whole(vq, c, &w, raw_third(d), ndesc, pos, wrap);
		flags = READ_ONCE(vq->packed.desc[pos].flags);
		if (unlikely(!is_available(flags, wrap)))
			return goes_nowhere(vq, raw_third(d), ndesc, pos);
		d = fetch_desc(&vq->packed.desc[pos]);
	}
}

/* Where a batch is: a position, and the flags that say that a slot there is available. */
struct packed_place {
	uint32_t pos;
	uint16_t want;
};

static inline struct packed_place packed_place(const struct virtqueue *vq)
{
	return (struct packed_place){ vq->last_avail, available_flags(vq->avail_wrap) };
}

/*
 * Takes descriptors from *d and its flags on, for as long as they are buffers of this kind (0 or
 * VRING_DESC_F_WRITE) and as most are. 1: that was the whole chain; 0: *d, at this place, is another; -1: broken.
 */
static inline __attribute__((always_inline)) int take_run(struct virtqueue *vq, struct chain_walk *w,
							  struct packed_place *at, struct raw_desc *d,
							  uint16_t *flags, uint32_t kind)
{
	const struct vring_packed_desc *desc = vq->packed.desc;
	const struct guest_memory *mem = vq->mem;
	uint32_t num = vq->num;

	while ((*flags & (VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE)) == kind && likely(chain_place(mem, w, *d))) {
		if (++at->pos == num) {
			at->pos = 0;
			at->want ^= AVAIL_USED;
		}
		if (!(*flags & VRING_DESC_F_NEXT))
			return 1;
		/* Of its flags, those count that were looked at, whatever they are when it is fetched. */
		*flags = READ_ONCE(desc[at->pos].flags);
		if (unlikely((*flags & AVAIL_USED) != at->want))
			return goes_nowhere(vq, raw_third(*d), w->n, at->pos);
		*d = fetch_desc(&desc[at->pos]);
	}
	return 0;
}

/* The chain at this place, if it is there. 1, 0 or -1, as virtqueue_pop. */
static inline __attribute__((always_inline)) int packed_take(struct virtqueue *vq,
							     struct packed_place *next,
							     struct vhost_chain *c)
{
	struct packed_place at = *next;
	/* Pairs with the driver's release of the head's flags: the whole chain is there. */
	uint16_t flags = LOAD_ACQUIRE(vq->packed.desc[at.pos].flags);
	struct chain_walk w;
	struct raw_desc d;
	int rc;

	if ((flags & AVAIL_USED) != at.want)
		return 0;
	w = chain_begin(vq, c);
	d = fetch_desc(&vq->packed.desc[at.pos]);
	rc = take_run(vq, &w, &at, &d, &flags, 0);
	chain_readable(c, &w);
	if (!rc)
		rc = take_run(vq, &w, &at, &d, &flags, VRING_DESC_F_WRITE);
	if (unlikely(rc <= 0)) {
		if (!rc)
			rc = walk_on(vq, c, w.n, w.len, d, flags, (uint16_t)at.pos,
				     at.want == available_flags(true));
		if (rc > 0)
			*next = packed_place(vq);
		return rc;
	}
	/* The id is valid in the last descriptor (2.8.6). */
	if (unlikely(check_id(vq, raw_third(d)) || chain_out(vq, c, &w, raw_third(d), w.n) < 0))
		return -1;
	*next = at;
	return 1;
}

/* A chain as the in-flight region has it: its slots may have been written over. It may lie as that of a
 * ring. */
static int packed_take_saved(struct virtqueue *vq, struct vhost_chain *c, uint16_t at)
{
	struct inflight *in = vq->inflight;
	uint32_t n = in->link[at].num;
	struct chain_walk w = chain_begin(vq, c);

	chain_readable(c, &w);
	for (uint32_t i = 1;; i++, at = in->link[at].next) {
		const struct inflight_packed_desc *e = &in->packed->desc[at];
		struct raw_desc d = { READ_ONCE(e->addr),
				      READ_ONCE(e->len) | (uint64_t)READ_ONCE(e->id) << 32 };
		uint16_t flags = READ_ONCE(e->flags);

		if (unlikely(!(flags & VRING_DESC_F_NEXT) != (i == n)))
			return vq_fault(vq, VQ_INFLIGHT_CHAIN, raw_third(d), i, n);
		if (flags & VRING_DESC_F_INDIRECT)
			return take_table(vq, c, w.n, w.len, n, d, flags, vq->last_avail,
					  vq->avail_wrap);
		if (unlikely(chain_add(vq, c, &w, raw_third(d), d, flags)))
			return -1;
		if (i == n)
			return take_whole(vq, c, &w, raw_third(d), n, vq->last_avail, vq->avail_wrap);
	}
}

static int packed_pop_plain(struct virtqueue *vq, struct vhost_chain **c, unsigned n)
{
	struct packed_place at = packed_place(vq);
	unsigned done;
	int rc = 0;

	for (done = 0; done < n; done++) {
		rc = packed_take(vq, &at, c[done]);
		if (rc <= 0)
			break;
	}
	vq->last_avail = (uint16_t)at.pos;
	vq->avail_wrap = at.want == available_flags(true);
	return likely(done) ? (int)done : rc;
}

/* With in-flight tracking: what a predecessor left comes first. */
static int packed_pop_tracked(struct virtqueue *vq, struct vhost_chain *c)
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
	rc = packed_pop_plain(vq, &c, 1);
	if (rc > 0)
		inflight_packed_popped(vq, c->id, c->ndesc, pos);
	return rc;
}

int packed_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n)
{
	if (unlikely(vq->inflight))
		return pop_each(vq, c, n, packed_pop_tracked);
	return packed_pop_plain(vq, c, n);
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

unsigned packed_fill_batch(struct virtqueue *vq, const struct virtqueue_used *used, unsigned n)
{
	struct vring_packed_desc *ring = vq->packed.desc;
	struct vq_slot *slots = vq->slots;
	uint32_t num = vq->num, total = vq->staged_slots, pos = vq->staged;
	uint16_t flags = used_flags(vq->staged_wrap);
	unsigned i;

	for (i = 0; i < n; i++) {
		uint16_t ndesc = device_take_back(slots, num, used[i]);
		uint16_t f = flags | (used[i].written ? VRING_DESC_F_WRITE : 0);

		if (unlikely(!ndesc))
			break;
		ring[pos].id = (uint16_t)used[i].id;
		ring[pos].len = used[i].written;
		if (!total)
			vq->first_flags = f;
		else
			WRITE_ONCE(ring[pos].flags, f);
		total += ndesc;
		pos += ndesc;
		if (pos >= num) {
			pos -= num;
			flags ^= AVAIL_USED;
		}
	}
	vq->staged = (uint16_t)pos;
	vq->staged_wrap = flags == used_flags(true);
	vq->staged_slots = total;
	return i;
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

int packed_push(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	int rc = device_fill(vq, id, written, packed_stage);

	if (likely(!rc))
		packed_flush(vq);
	return rc;
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
