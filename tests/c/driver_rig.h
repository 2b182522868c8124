/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A driver queue and, played by hand, the device at the other end of it: written from the text of
 * VIRTIO 1.2 and not from the device code, so that the driver is not tested against the other half
 * of the same mind. Knows both formats' layout; one thread.
 */
#ifndef VHOST_TEST_DRIVER_RIG_H
#define VHOST_TEST_DRIVER_RIG_H

#include <errno.h>
#include <string.h>

#include "check.h"
#include "virtqueue.h"

#define MAX_BUFS 8
#define TABLE_ADDR 0x7000000000ull

struct rig {
	struct driver_queue dq;
	bool packed, in_order;
	uint32_t num;
	struct vring_desc *desc;
	struct vring_packed_desc *pdesc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct vring_packed_desc_event *driver, *device;
	struct vring_desc *tables;
	void *area[4];
	/* The device's own state. */
	uint16_t next_avail, next_used;
	bool avail_wrap, used_wrap;
};

struct options {
	bool packed, event_idx, in_order;
	uint32_t num, indirect_max;
	bool has_base;
	uint32_t base;
};

static inline int rig_try(struct rig *r, const struct options *o)
{
	uint32_t base = o->has_base ? o->base : o->packed ? 0x80008000u : 0;
	struct driver_config cfg = { .num = o->num,
				     .base = base,
				     .packed = o->packed,
				     .event_idx = o->event_idx,
				     .in_order = o->in_order };
	size_t sizes[4] = { vring_desc_size(o->num), vring_driver_size(o->num, o->packed),
			    vring_device_size(o->num, o->packed),
			    (size_t)o->num * o->indirect_max * 16 };

	memset(r, 0, sizeof(*r));
	for (int i = 0; i < 4; i++) {
		/* Exactly as long as they are said to be, so that ASan sees a byte too many; and
		 * dirty. */
		r->area[i] = aligned_alloc(16, (sizes[i] + 15) & ~15ul);
		r->area[i] = realloc(r->area[i], sizes[i] ? sizes[i] : 1);
		memset(r->area[i], 0xa5, sizes[i]);
	}
	r->packed = o->packed;
	r->in_order = o->in_order;
	r->num = o->num;
	r->desc = r->area[0];
	r->pdesc = r->area[0];
	r->avail = r->area[1];
	r->driver = r->area[1];
	r->used = r->area[2];
	r->device = r->area[2];
	r->tables = r->area[3];
	cfg.areas = (struct virtqueue_areas){ r->area[0], r->area[1], r->area[2] };
	if (o->indirect_max) {
		cfg.indirect = r->tables;
		cfg.indirect_addr = TABLE_ADDR;
		cfg.indirect_max = o->indirect_max;
	}
	r->next_avail = r->next_used = base & (o->packed ? 0x7fff : 0xffff);
	r->avail_wrap = r->used_wrap = base & 0x8000;
	return driver_queue_init(&r->dq, &cfg);
}

static inline void rig_free(struct rig *r)
{
	driver_queue_destroy(&r->dq);
	for (int i = 0; i < 4; i++)
		free(r->area[i]);
}

static inline void rig_init(struct rig *r, const struct options *o)
{
	CHECK_EQ(rig_try(r, o), 0);
}

/* ---------------------------------------------------------- the device, by hand */

struct seen {
	uint16_t id, slots;
	bool indirect;
	unsigned n;
	struct virtqueue_buf bufs[MAX_BUFS];
	bool write[MAX_BUFS];
};

static inline void see(struct seen *s, uint64_t addr, uint32_t len, uint16_t flags)
{
	CHECK(s->n < MAX_BUFS);
	s->bufs[s->n] = (struct virtqueue_buf){ addr, len };
	s->write[s->n++] = flags & VRING_DESC_F_WRITE;
}

static const void *table_of(struct rig *r, uint64_t addr, uint32_t len)
{
	CHECK(len % 16 == 0 && len >= 32);
	CHECK(addr >= TABLE_ADDR);
	return (const uint8_t *)r->tables + (addr - TABLE_ADDR);
}

static inline bool split_dev_pop(struct rig *r, struct seen *s)
{
	uint16_t i;

	if (r->avail->idx == r->next_avail)
		return false;
	s->id = i = r->avail->ring[r->next_avail++ % r->num];
	for (;;) {
		struct vring_desc d = r->desc[i];

		s->slots++;
		if (d.flags & VRING_DESC_F_INDIRECT) {
			const struct vring_desc *t = table_of(r, d.addr, d.len);
			uint32_t n = d.len / 16;

			CHECK_EQ(d.flags, VRING_DESC_F_INDIRECT);
			s->indirect = true;
			for (uint32_t k = 0; k < n; k++) {
				CHECK_EQ(!!(t[k].flags & VRING_DESC_F_NEXT), k + 1 < n);
				CHECK_EQ(t[k].next, k + 1 < n ? k + 1 : 0);
				see(s, t[k].addr, t[k].len, t[k].flags);
			}
			return true;
		}
		see(s, d.addr, d.len, d.flags);
		if (!(d.flags & VRING_DESC_F_NEXT))
			return true;
		if (r->in_order) /* 2.7.5: in ring order */
			CHECK_EQ(d.next, (i + 1) % r->num);
		CHECK(d.next < r->num);
		i = d.next;
	}
}

static inline bool packed_dev_pop(struct rig *r, struct seen *s)
{
	for (;;) {
		struct vring_packed_desc d = r->pdesc[r->next_avail];
		bool a = d.flags & VRING_PACKED_DESC_F_AVAIL;
		bool u = d.flags & VRING_PACKED_DESC_F_USED;

		if (a != r->avail_wrap || u == r->avail_wrap) {
			CHECK(!s->slots); /* no partial list, ever (2.8.6) */
			return false;
		}
		s->slots++;
		if (++r->next_avail == r->num) {
			r->next_avail = 0;
			r->avail_wrap = !r->avail_wrap;
		}
		s->id = d.id;
		if (d.flags & VRING_DESC_F_INDIRECT) {
			const struct vring_packed_desc *t = table_of(r, d.addr, d.len);

			CHECK_EQ(d.flags & 7, VRING_DESC_F_INDIRECT);
			s->indirect = true;
			for (uint32_t k = 0; k < d.len / 16; k++) {
				CHECK_EQ(t[k].flags & ~VRING_DESC_F_WRITE, 0);
				see(s, t[k].addr, t[k].len, t[k].flags);
			}
			return true;
		}
		see(s, d.addr, d.len, d.flags);
		if (!(d.flags & VRING_DESC_F_NEXT))
			return true;
	}
}

static inline bool dev_pop(struct rig *r, struct seen *s)
{
	memset(s, 0, sizeof(*s));
	return r->packed ? packed_dev_pop(r, s) : split_dev_pop(r, s);
}

/* Uses `chains` chains of together `slots` slots with one element that names the last (IN_ORDER),
 * or one chain. */
static inline void dev_use_batch(struct rig *r, uint32_t id, uint32_t len, unsigned chains,
				 unsigned slots)
{
	if (r->packed) {
		struct vring_packed_desc *d = &r->pdesc[r->next_used];

		d->id = (uint16_t)id;
		d->len = len;
		d->flags = r->used_wrap ?
				   VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED | 2 :
				   2;
		r->next_used += slots;
		if (r->next_used >= r->num) {
			r->next_used -= r->num;
			r->used_wrap = !r->used_wrap;
		}
	} else {
		r->used->ring[r->next_used % r->num] = (struct vring_used_elem){ id, len };
		r->next_used += chains;
		r->used->idx = r->next_used;
	}
}

static inline void dev_use(struct rig *r, const struct seen *s, uint32_t len)
{
	dev_use_batch(r, s->id, len, 1, s->slots);
}

/* ------------------------------------------------------------------ helpers */

static uint64_t rng_state = 0x9e3779b97f4a7c15ull;

static inline uint32_t rnd(uint32_t below)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return (uint32_t)(rng_state >> 33) % below;
}

static const struct virtqueue_buf two[2] = { { 0x1000, 16 }, { 0x2000, 512 } };

static inline int add_two(struct rig *r, uint64_t token)
{
	return virtqueue_add(&r->dq, two, 1, 1, token);
}

static inline void expect_buf(struct rig *r, uint64_t token, uint32_t written)
{
	uint64_t t = ~0ull;
	uint32_t w = ~0u;

	CHECK_EQ(virtqueue_get_buf(&r->dq, &t, &w), 1);
	CHECK_EQ(t, token);
	CHECK_EQ(w, written);
}

static inline void expect_none(struct rig *r)
{
	uint64_t t;
	uint32_t w;

	CHECK_EQ(virtqueue_get_buf(&r->dq, &t, &w), 0);
}

/* Broken with this reason, for good, and for every function. */
static inline void expect_fault(struct rig *r, enum virtqueue_fault fault, uint64_t value,
				uint64_t limit)
{
	uint64_t t;
	uint32_t w;

	for (int i = 0; i < 3; i++)
		CHECK_EQ(virtqueue_get_buf(&r->dq, &t, &w), -1);
	CHECK_EQ(r->dq.report.fault, fault);
	CHECK_EQ(r->dq.report.value, value);
	CHECK_EQ(r->dq.report.limit, limit);
	CHECK_EQ(add_two(r, 0), -EIO);
	CHECK(virtqueue_more_used(&r->dq)); /* nobody waits for a broken queue */
	CHECK(virtqueue_enable_cb(&r->dq));
	CHECK(strlen(virtqueue_fault_text(fault)) > 5);
}

static char context[128];

static inline void set_context(const struct options *o)
{
	snprintf(context, sizeof(context),
		 "%s num=%u event_idx=%d in_order=%d indirect=%u base=%#x",
		 o->packed ? "packed" : "split", o->num, o->event_idx, o->in_order, o->indirect_max,
		 o->base);
	check_context = context;
}

#define BOTH(o) for (int p_ = 0; p_ < 2 && ((o).packed = p_, set_context(&(o)), 1); p_++)

#endif
