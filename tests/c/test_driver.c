/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The driver's side of both ring formats against a device that is played by hand here, from the
 * text of VIRTIO 1.2 and not from the device code: what the driver lays out, what it takes back,
 * when it kicks, and what it does when the device lies.
 */
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

static int rig_try(struct rig *r, const struct options *o)
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

static void rig_free(struct rig *r)
{
	driver_queue_destroy(&r->dq);
	for (int i = 0; i < 4; i++)
		free(r->area[i]);
}

static void rig_init(struct rig *r, const struct options *o)
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

static void see(struct seen *s, uint64_t addr, uint32_t len, uint16_t flags)
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

static bool split_dev_pop(struct rig *r, struct seen *s)
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

static bool packed_dev_pop(struct rig *r, struct seen *s)
{
	for (;;) {
		struct vring_packed_desc d = r->pdesc[r->next_avail];
		bool a = d.flags & VRING_PACKED_DESC_F_AVAIL, u = d.flags & VRING_PACKED_DESC_F_USED;

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

static bool dev_pop(struct rig *r, struct seen *s)
{
	memset(s, 0, sizeof(*s));
	return r->packed ? packed_dev_pop(r, s) : split_dev_pop(r, s);
}

/* Uses `chains` chains of together `slots` slots with one element that names the last (IN_ORDER),
 * or one chain. */
static void dev_use_batch(struct rig *r, uint32_t id, uint32_t len, unsigned chains, unsigned slots)
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

static void dev_use(struct rig *r, const struct seen *s, uint32_t len)
{
	dev_use_batch(r, s->id, len, 1, s->slots);
}

/* ------------------------------------------------------------------ helpers */

static uint64_t rng_state = 0x9e3779b97f4a7c15ull;

static uint32_t rnd(uint32_t below)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return (uint32_t)(rng_state >> 33) % below;
}

static const struct virtqueue_buf two[2] = { { 0x1000, 16 }, { 0x2000, 512 } };

static int add_two(struct rig *r, uint64_t token)
{
	return virtqueue_add(&r->dq, two, 1, 1, token);
}

static void expect_buf(struct rig *r, uint64_t token, uint32_t written)
{
	uint64_t t = ~0ull;
	uint32_t w = ~0u;

	CHECK_EQ(virtqueue_get_buf(&r->dq, &t, &w), 1);
	CHECK_EQ(t, token);
	CHECK_EQ(w, written);
}

static void expect_none(struct rig *r)
{
	uint64_t t;
	uint32_t w;

	CHECK_EQ(virtqueue_get_buf(&r->dq, &t, &w), 0);
}

/* Broken with this reason, for good, and for every function. */
static void expect_fault(struct rig *r, enum virtqueue_fault fault, uint64_t value, uint64_t limit)
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

static void set_context(const struct options *o)
{
	snprintf(context, sizeof(context), "%s num=%u event_idx=%d in_order=%d indirect=%u base=%#x",
		 o->packed ? "packed" : "split", o->num, o->event_idx, o->in_order, o->indirect_max,
		 o->base);
	check_context = context;
}

#define BOTH(o) for (int p_ = 0; p_ < 2 && ((o).packed = p_, set_context(&(o)), 1); p_++)

/* --------------------------------------------------------------- what is laid out */

static void test_init(void)
{
	static const struct {
		bool packed;
		uint32_t num, base;
		int rc;
	} cases[] = {
		{ false, 0, 0, -EINVAL },	{ false, 3, 0, -EINVAL },
		{ false, 65536, 0, -EINVAL },	{ false, 1, 0, 0 },
		{ false, 32768, 0, 0 },		{ false, 8, 0xffff, 0 },
		{ false, 8, 0x10000, -EINVAL }, { true, 0, 0x80008000, -EINVAL },
		{ true, 32769, 0x80008000, -EINVAL }, { true, 1, 0x80008000, 0 },
		{ true, 3, 0x80008000, 0 },	{ true, 32768, 0x80008000, 0 },
		{ true, 8, 0x80078007, 0 },	{ true, 8, 0x00070007, 0 },
		{ true, 8, 0x80088008, -EINVAL }, { true, 8, 0x80068007, -EINVAL },
		{ true, 8, 0x80070007, -EINVAL },
	};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct options o = { .packed = cases[i].packed,
				     .num = cases[i].num,
				     .has_base = true,
				     .base = cases[i].base };
		struct rig r;

		set_context(&o);
		CHECK_EQ(rig_try(&r, &o), cases[i].rc);
		if (!cases[i].rc) {
			struct seen s;

			CHECK_EQ(driver_queue_base(&r.dq), o.base);
			CHECK(!dev_pop(&r, &s));
			expect_none(&r);
			CHECK(!virtqueue_kick_prepare(&r.dq));
		}
		rig_free(&r);
	}
}

static void test_add_layout(void)
{
	const struct virtqueue_buf bufs[4] = { { 0x10, 1 }, { 0x20, 2 }, { 0x30, 3 }, { 0x40, 4 } };
	struct options o = { .num = 8, .indirect_max = 3 };
	struct rig r;
	struct seen s;

	BOTH(o) {
		rig_init(&r, &o);
		/* Too long for a table: laid out in the ring. */
		CHECK(virtqueue_add(&r.dq, bufs, 1, 3, 1) >= 0);
		CHECK(dev_pop(&r, &s));
		CHECK(!s.indirect);
		CHECK_EQ(s.n, 4);
		CHECK_EQ(s.slots, 4);
		for (unsigned i = 0; i < 4; i++) {
			CHECK_EQ(s.bufs[i].addr, bufs[i].addr);
			CHECK_EQ(s.bufs[i].len, bufs[i].len);
			CHECK_EQ(s.write[i], i >= 1);
		}
		/* Fits into one. */
		CHECK(virtqueue_add(&r.dq, bufs, 3, 0, 2) >= 0);
		CHECK(dev_pop(&r, &s));
		CHECK(s.indirect);
		CHECK_EQ(s.n, 3);
		CHECK_EQ(s.slots, 1);
		CHECK(!s.write[2]);
		/* A single buffer needs none. */
		CHECK(virtqueue_add(&r.dq, bufs, 0, 1, 3) >= 0);
		CHECK(dev_pop(&r, &s));
		CHECK(!s.indirect);
		CHECK(s.write[0]);
		/* 8 - 4 - 1 - 1 are left: four more do not fit, two do, in a table. */
		CHECK_EQ(r.dq.num_free, 2);
		CHECK_EQ(virtqueue_add(&r.dq, bufs, 4, 0, 4), -ENOSPC);
		CHECK(!dev_pop(&r, &s));
		CHECK(virtqueue_add(&r.dq, bufs, 1, 1, 5) >= 0);
		CHECK(virtqueue_add(&r.dq, bufs, 1, 1, 6) >= 0);
		CHECK_EQ(virtqueue_add(&r.dq, bufs, 1, 0, 7), -ENOSPC);
		rig_free(&r);
	}
}

static void test_add_refuses(void)
{
	const struct virtqueue_buf zero[2] = { { 0x1000, 16 }, { 0x2000, 0 } };
	const struct virtqueue_buf wraps[1] = { { ~0ull - 14, 16 } };
	const struct virtqueue_buf top[1] = { { ~0ull - 15, 16 } };
	const struct virtqueue_buf big[2] = { { 0, 0xffffffff }, { 0, 1 } };
	const struct virtqueue_buf many[5] = { { 1, 1 }, { 1, 1 }, { 1, 1 }, { 1, 1 }, { 1, 1 } };
	struct options o = { .num = 4, .indirect_max = 8 };
	struct rig r;
	struct seen s;

	BOTH(o) {
		struct virtqueue_request reqs[3] = {
			{ zero, 1, 1, 1 }, { many, 1, 1, 2 }, { zero, 1, 1, 3 },
		};

		rig_init(&r, &o);
		CHECK_EQ(virtqueue_add(&r.dq, NULL, 0, 0, 0), -EINVAL);
		CHECK_EQ(virtqueue_add(&r.dq, zero, 1, 1, 0), -EINVAL);
		CHECK_EQ(virtqueue_add(&r.dq, wraps, 1, 0, 0), -EINVAL);
		CHECK_EQ(virtqueue_add(&r.dq, big, 1, 1, 0), -EINVAL);
		CHECK_EQ(virtqueue_add(&r.dq, many, 2, 3, 0), -EINVAL); /* 5 in a queue of 4 */
		CHECK_EQ(virtqueue_add(&r.dq, many, ~0u, 2, 0), -EINVAL);
		CHECK_EQ(virtqueue_add_batch(&r.dq, reqs, 3), -EINVAL);
		CHECK_EQ(virtqueue_add_batch(&r.dq, reqs, 0), 0);
		CHECK_EQ(r.dq.num_free, 4);
		CHECK(!dev_pop(&r, &s));
		CHECK(!virtqueue_kick_prepare(&r.dq));
		/* What stands before the bad one goes out. */
		CHECK_EQ(virtqueue_add_batch(&r.dq, reqs + 1, 2), 1);
		CHECK(dev_pop(&r, &s));
		CHECK(!dev_pop(&r, &s));
		CHECK(virtqueue_kick_prepare(&r.dq));
		CHECK(virtqueue_add(&r.dq, top, 1, 0, 0) >= 0);
		CHECK(virtqueue_add(&r.dq, big, 1, 0, 0) >= 0);
		rig_free(&r);
	}
}

/* ------------------------------------------------------------- against a model */

#define MODEL_OUT 4096

struct expected {
	uint64_t token;
	unsigned out, in;
	struct virtqueue_buf bufs[MAX_BUFS];
	uint32_t in_len, written;
	struct seen seen;
};

struct model {
	struct rig r;
	const struct options *o;
	/* Chains that the driver added and the device did not pop; those it popped and did not use;
	 * those it used and the driver did not get back. The first and the last are queues. */
	struct expected added[MODEL_OUT], popped[MODEL_OUT], done[MODEL_OUT];
	unsigned nadded, npopped, ndone;
	uint32_t free;
	uint64_t tokens, got;
};

static void take(struct expected *from, unsigned *n, unsigned at, struct expected *to)
{
	*to = from[at];
	memmove(&from[at], &from[at + 1], (--*n - at) * sizeof(*from));
}

static void model_add(struct model *m)
{
	struct virtqueue_request reqs[5];
	struct expected e[5];
	unsigned n = 1 + rnd(5), want = 0;
	int first = 0, rc;
	bool stop = false;

	for (unsigned k = 0; k < n; k++) {
		unsigned total = 1 + rnd(4), slots;
		int why = 0;

		memset(&e[k], 0, sizeof(e[k]));
		e[k].token = m->tokens + k;
		e[k].out = rnd(total + 1);
		e[k].in = total - e[k].out;
		for (unsigned i = 0; i < total; i++) {
			e[k].bufs[i] = (struct virtqueue_buf){ rnd(1u << 30), 1 + rnd(5000) };
			e[k].in_len += i < e[k].out ? 0 : e[k].bufs[i].len;
		}
		reqs[k] = (struct virtqueue_request){ e[k].bufs, e[k].out, e[k].in, e[k].token };
		slots = total > 1 && total <= m->o->indirect_max ? 1 : total;
		if (total > m->r.num)
			why = -EINVAL;
		else if (slots > m->free)
			why = -ENOSPC;
		if (!why && !stop) {
			m->free -= slots;
			want++;
		} else if (!k) {
			first = why;
		}
		stop = stop || why;
	}
	if (n == 1) {
		rc = virtqueue_add(&m->r.dq, reqs[0].bufs, reqs[0].out, reqs[0].in, reqs[0].token);
		CHECK_EQ(rc < 0 ? rc : 0, first);
	} else {
		rc = virtqueue_add_batch(&m->r.dq, reqs, n);
		CHECK_EQ(rc, want ? (int)want : first);
	}
	for (unsigned k = 0; k < want; k++)
		m->added[m->nadded++] = e[k];
	m->tokens += want;
	CHECK_EQ(m->r.dq.num_free, m->free);
}

static void model_pop(struct model *m)
{
	struct expected e;
	struct seen s;

	if (!dev_pop(&m->r, &s)) {
		CHECK_EQ(m->nadded, 0);
		return;
	}
	CHECK(m->nadded);
	take(m->added, &m->nadded, 0, &e);
	CHECK_EQ(s.n, e.out + e.in);
	for (unsigned i = 0; i < s.n; i++) {
		CHECK_EQ(s.bufs[i].addr, e.bufs[i].addr);
		CHECK_EQ(s.bufs[i].len, e.bufs[i].len);
		CHECK_EQ(s.write[i], i >= e.out);
	}
	for (unsigned i = 0; i < m->npopped; i++)
		CHECK(m->popped[i].seen.id != s.id); /* unique among those that are out */
	e.seen = s;
	m->popped[m->npopped++] = e;
}

static void model_use(struct model *m)
{
	unsigned slots = 0, batch;
	struct expected e;

	if (!m->npopped)
		return;
	if (!m->o->in_order) {
		take(m->popped, &m->npopped, rnd(m->npopped), &e);
		e.written = rnd(2) ? rnd(20000) : 0; /* often more than there is room for */
		dev_use(&m->r, &e.seen, e.written);
		if (e.written > e.in_len)
			e.written = e.in_len;
		m->done[m->ndone++] = e;
		return;
	}
	batch = 1 + rnd(m->npopped);
	for (unsigned i = 0; i < batch; i++) {
		take(m->popped, &m->npopped, 0, &e);
		slots += e.seen.slots;
		e.written = e.in_len; /* those that are skipped count as full */
		if (i + 1 == batch) {
			uint32_t len = rnd(20000);

			dev_use_batch(&m->r, e.seen.id, len, batch, slots);
			e.written = len < e.in_len ? len : e.in_len;
		}
		m->done[m->ndone++] = e;
	}
}

static void model_get(struct model *m)
{
	struct expected e;

	CHECK_EQ(virtqueue_more_used(&m->r.dq), m->ndone != 0);
	if (!m->ndone) {
		expect_none(&m->r);
		return;
	}
	take(m->done, &m->ndone, 0, &e);
	expect_buf(&m->r, e.token, e.written);
	m->free += e.seen.slots;
	m->got++;
	CHECK_EQ(m->r.dq.num_free, m->free);
}

static void run_model(const struct options *o, uint64_t chains)
{
	struct model *m = calloc(1, sizeof(*m));

	set_context(o);
	rig_init(&m->r, o);
	m->o = o;
	m->free = o->num;
	while (m->got < chains) {
		switch (rnd(6)) {
		case 0:
			if (m->nadded + m->npopped + m->ndone + 5 < MODEL_OUT)
				model_add(m);
			break;
		case 1:
			for (unsigned n = rnd(6); n; n--)
				model_pop(m);
			break;
		case 2:
			model_use(m);
			break;
		case 3:
			if (rnd(2))
				virtqueue_disable_cb(&m->r.dq);
			else
				CHECK_EQ(virtqueue_enable_cb(&m->r.dq), m->ndone != 0);
			break;
		default:
			for (unsigned n = rnd(6); n; n--)
				model_get(m);
		}
	}
	/* Idle again, nothing lost: all comes back, all is free. */
	while (m->nadded)
		model_pop(m);
	while (m->npopped)
		model_use(m);
	while (m->ndone)
		model_get(m);
	expect_none(&m->r);
	CHECK_EQ(m->free, o->num);
	CHECK_EQ(driver_queue_base(&m->r.dq) & 0xffff,
		 m->r.next_avail | (o->packed && m->r.avail_wrap ? 0x8000 : 0));
	rig_free(&m->r);
	free(m);
}

static void test_model(void)
{
	static const uint32_t split_nums[] = { 1, 2, 4, 64, 1024 }, packed_nums[] = { 1, 2, 3, 7, 100 };

	for (unsigned bits = 0; bits < 16; bits++) {
		for (unsigned i = 0; i < 5; i++) {
			struct options o = { .packed = bits & 1,
					     .event_idx = bits & 2,
					     .in_order = bits & 4,
					     .indirect_max = bits & 8 ? 3 : 0,
					     .has_base = true };

			o.num = o.packed ? packed_nums[i] : split_nums[i];
			/* Close to where 16 bits wrap, and in the second lap. */
			o.base = !o.packed ? 0xfff0 : i & 1 ? (o.num - 1) * 0x10001u : 0x80008000;
			run_model(&o, 3000);
		}
	}
}

static void test_largest(void)
{
	struct options o = { .num = 32768 };

	BOTH(o) {
		struct virtqueue_request req = { two, 1, 0, 0 };
		struct rig r;
		struct seen s;

		rig_init(&r, &o);
		for (unsigned lap = 0; lap < 3; lap++) {
			for (uint64_t i = 0; i < o.num; i++) {
				req.token = i;
				CHECK_EQ(virtqueue_add_batch(&r.dq, &req, 1), 1);
			}
			CHECK_EQ(virtqueue_add_batch(&r.dq, &req, 1), -ENOSPC);
			for (uint64_t i = 0; i < o.num; i++) {
				CHECK(dev_pop(&r, &s));
				dev_use(&r, &s, 0);
			}
			CHECK(!dev_pop(&r, &s));
			for (uint64_t i = 0; i < o.num; i++)
				expect_buf(&r, i, 0);
			expect_none(&r);
		}
		rig_free(&r);
	}
}

/* ------------------------------------------------------------------ notifications */

static void dev_ask(struct rig *r, uint64_t at)
{
	if (r->packed) {
		r->device->off_wrap = at % r->num | ((at / r->num) & 1 ? 0 : 0x8000);
		r->device->flags = VRING_PACKED_EVENT_FLAG_DESC;
	} else {
		*(uint16_t *)&r->used->ring[r->num] = (uint16_t)at;
	}
}

/* Kicks against the definition: is the element that the device asked for among those that were
 * added since the last look? Counted in 64 bits here, so that no wrap hides. */
static void test_kick_event(void)
{
	static const uint32_t nums[] = { 1, 4, 256, 3, 100 };
	struct virtqueue_request req = { two, 1, 1, 7 };

	for (unsigned k = 0; k < 8; k++) {
		struct options o = { .packed = k >= 3, .event_idx = true, .num = nums[k % 5] };
		uint64_t added = 0, old = 0;
		unsigned kicks = 0, slots = 2;
		struct rig r;
		struct seen s;

		set_context(&o);
		rig_init(&r, &o);
		if (o.num == 1) {
			req.in = 0;
			slots = 1;
		} else {
			req.in = 1;
		}
		for (unsigned round = 0; round < 3000; round++) {
			unsigned n = rnd(16) ? rnd(2 * o.num + 2) : 0;
			uint64_t at;
			bool want, kick;

			if (round % 1000 == 999)
				n = 70000; /* more than 16 bits count, and no kick asked for meanwhile */
			if (round % 1000 == 500)
				n = 65536;
			while (n--) {
				CHECK_EQ(virtqueue_add_batch(&r.dq, &req, 1), 1);
				added += r.packed ? slots : 1;
				CHECK(dev_pop(&r, &s));
				dev_use(&r, &s, 0);
				expect_buf(&r, 7, 0);
			}
			/* The device may only ask for what is to come from where it has got to, but
			 * it may have asked long ago. */
			at = old + rnd(2 * o.num + 2);
			if (added > old && rnd(2))
				at = old + rnd(added - old > 100000 ? 100000 : (uint32_t)(added - old));
			if (at >= added + o.num)
				at = added;
			dev_ask(&r, at);
			want = at >= old && at < added;
			kick = virtqueue_kick_prepare(&r.dq);
			/* After so many that an index no longer tells "done long ago" from "to
			 * come", a kick too many is fine; one too few never is. */
			if (want || added - old <= (r.packed ? o.num : 65536 - o.num))
				CHECK_EQ(kick, want);
			CHECK(!virtqueue_kick_prepare(&r.dq)); /* once for each addition */
			kicks += want;
			old = added;
		}
		CHECK(kicks > 300 && kicks < 2900);
		rig_free(&r);
	}
}

static void test_kick_flags(void)
{
	struct options o = { .num = 8 };
	struct rig r;

	for (int event_idx = 0; event_idx < 2; event_idx++) {
		o.event_idx = event_idx;
		o.packed = false;
		set_context(&o);
		rig_init(&r, &o);
		r.used->flags = VRING_USED_F_NO_NOTIFY;
		*(uint16_t *)&r.used->ring[8] = event_idx ? 0 : 5;
		add_two(&r, 1);
		/* EVENT_IDX ignores the flag, and without it the index is ignored (2.7.10.1). */
		CHECK_EQ(virtqueue_kick_prepare(&r.dq), event_idx);
		r.used->flags = 0xfffe;
		add_two(&r, 1);
		CHECK_EQ(virtqueue_kick_prepare(&r.dq), !event_idx);
		rig_free(&r);

		o.packed = true;
		set_context(&o);
		rig_init(&r, &o);
		r.device->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
		add_two(&r, 1);
		CHECK(!virtqueue_kick_prepare(&r.dq));
		r.device->flags = VRING_PACKED_EVENT_FLAG_ENABLE;
		add_two(&r, 1);
		CHECK(virtqueue_kick_prepare(&r.dq));
		/* Reserved bits are ignored, the reserved value and a position that does not exist
		 * get the kick: a device that waits must not be left waiting. */
		r.device->flags = 0xfffc | VRING_PACKED_EVENT_FLAG_DISABLE;
		add_two(&r, 1);
		CHECK(!virtqueue_kick_prepare(&r.dq));
		CHECK_EQ(r.dq.num_free, 2);
		r.device->flags = 3;
		add_two(&r, 1);
		CHECK(virtqueue_kick_prepare(&r.dq));
		rig_free(&r);

		rig_init(&r, &o);
		r.device->flags = VRING_PACKED_EVENT_FLAG_DESC;
		r.device->off_wrap = 8 | 0x8000;
		add_two(&r, 1);
		CHECK(virtqueue_kick_prepare(&r.dq));
		r.device->off_wrap = 7 | 0x8000; /* DESC counts only with EVENT_IDX */
		add_two(&r, 1);
		CHECK_EQ(virtqueue_kick_prepare(&r.dq), !event_idx);
		rig_free(&r);
	}
}

/* Would a device that just used position `at` have to call? From the text, in 64 bits. */
static bool would_call(struct rig *r, const struct options *o, uint64_t at)
{
	if (!r->packed) {
		if (!o->event_idx)
			return !(r->avail->flags & VRING_AVAIL_F_NO_INTERRUPT);
		CHECK_EQ(r->avail->flags, 0);
		return r->avail->ring[r->num] == (uint16_t)at;
	}
	if (r->driver->flags != VRING_PACKED_EVENT_FLAG_DESC)
		return r->driver->flags == VRING_PACKED_EVENT_FLAG_ENABLE;
	CHECK(o->event_idx);
	return r->driver->off_wrap == (at % r->num | ((at / r->num) & 1 ? 0 : 0x8000));
}

static void test_callbacks(void)
{
	struct options o = { .num = 6 };
	struct rig r;
	struct seen s;

	for (unsigned bits = 0; bits < 8; bits++) {
		uint64_t at = 0; /* the position that the device uses next */
		unsigned step;

		o.packed = bits & 1;
		o.event_idx = bits & 2;
		o.in_order = bits & 4;
		o.num = o.packed ? 6 : 8;
		step = o.packed ? 2 : 1;
		set_context(&o);
		rig_init(&r, &o);
		CHECK(would_call(&r, &o, at)); /* enabled when new */

		for (unsigned round = 0; round < 40; round++) {
			virtqueue_disable_cb(&r.dq);
			CHECK(!would_call(&r, &o, at));
			virtqueue_disable_cb(&r.dq);
			CHECK(add_two(&r, 1) >= 0);
			CHECK(add_two(&r, 2) >= 0);
			CHECK(dev_pop(&r, &s));
			CHECK(!virtqueue_enable_cb(&r.dq));
			CHECK(would_call(&r, &o, at));
			dev_use(&r, &s, 0);
			at += step;
			/* Something came meanwhile: enable says so. */
			CHECK(virtqueue_enable_cb(&r.dq));
			CHECK(virtqueue_more_used(&r.dq));
			expect_buf(&r, 1, 0);
			CHECK(!virtqueue_more_used(&r.dq));
			/* Callbacks are on, so once get_buf says "none" the next element calls. */
			expect_none(&r);
			CHECK(would_call(&r, &o, at));
			/* ... but with callbacks off it asks for nothing behind the caller's back.
			 * */
			virtqueue_disable_cb(&r.dq);
			expect_none(&r);
			CHECK(!would_call(&r, &o, at));
			CHECK(dev_pop(&r, &s));
			dev_use(&r, &s, 0);
			at += step;
			expect_buf(&r, 2, 0);
			expect_none(&r);
			CHECK(!would_call(&r, &o, at));
			CHECK(!virtqueue_enable_cb(&r.dq));
			CHECK(would_call(&r, &o, at));
		}
		rig_free(&r);
	}
}

/* ------------------------------------------------------------------- base */

static void test_base(void)
{
	for (unsigned bits = 0; bits < 4; bits++) {
		struct options o = { .packed = bits & 1, .in_order = bits & 2, .num = 8 };

		o.num = o.packed ? 5 : 8;
		for (unsigned n = 0; n < 23; n++) {
			struct rig r;
			struct seen s;
			struct options again = o;

			set_context(&o);
			rig_init(&r, &o);
			for (unsigned i = 0; i < n; i++) {
				CHECK(add_two(&r, i) >= 0);
				CHECK(dev_pop(&r, &s));
				dev_use(&r, &s, 0);
				expect_buf(&r, i, 0);
			}
			again.has_base = true;
			again.base = driver_queue_base(&r.dq);
			if (o.packed)
				CHECK_EQ(again.base, ((2 * n) % 5 | ((2 * n / 5) & 1 ? 0 : 0x8000)) *
							     0x10001u);
			else
				CHECK_EQ(again.base, n);
			/* One more is out: the two positions of a packed ring part. */
			CHECK(add_two(&r, n) >= 0);
			CHECK(driver_queue_base(&r.dq) != again.base);
			CHECK_EQ(driver_queue_base(&r.dq) >> 16, o.packed ? again.base >> 16 : 0);
			rig_free(&r);

			/* The next driver goes on there; the device keeps its positions. */
			set_context(&again);
			rig_init(&r, &again);
			CHECK(!dev_pop(&r, &s));
			for (unsigned i = 0; i < 20; i++) {
				CHECK(add_two(&r, i) >= 0);
				CHECK(dev_pop(&r, &s));
				expect_none(&r);
				dev_use(&r, &s, 0);
				expect_buf(&r, i, 0);
				expect_none(&r);
			}
			rig_free(&r);
		}
	}
}

/* ----------------------------------------------------------- a device that lies */

static void test_id_range(void)
{
	static const uint32_t ids[] = { 8, 9, 0xffff, 0x10000, 0x10001, 0xffffffff };
	struct options o = { .num = 8 };

	for (int in_order = 0; in_order < 2; in_order++) {
		o.in_order = in_order;
		BOTH(o) {
			for (unsigned i = 0; i < 6; i++) {
				struct rig r;

				if (o.packed && ids[i] > 0xffff)
					continue;
				rig_init(&r, &o);
				add_two(&r, 1);
				add_two(&r, 2);
				dev_use_batch(&r, ids[i], 0, 1, 2);
				expect_fault(&r, VQ_ID_RANGE, ids[i], 8);
				rig_free(&r);
			}
		}
	}
}

static void test_id_not_out(void)
{
	struct options o = { .num = 8 };
	struct rig r;
	struct seen s;

	for (int in_order = 0; in_order < 2; in_order++) {
		o.in_order = in_order;
		BOTH(o) {
			/* Never made available; split: in the middle of a chain. */
			for (unsigned wrong = 0; wrong < 8; wrong++) {
				rig_init(&r, &o);
				add_two(&r, 1);
				CHECK(dev_pop(&r, &s));
				if (s.id != wrong) {
					dev_use_batch(&r, wrong, 0, 1, 2);
					expect_fault(&r, VQ_USED_ID, wrong, 0);
					CHECK_EQ(r.dq.report.head, wrong);
				}
				rig_free(&r);
			}
			/* Used twice. */
			rig_init(&r, &o);
			add_two(&r, 1);
			add_two(&r, 2);
			CHECK(dev_pop(&r, &s));
			dev_use(&r, &s, 5);
			dev_use(&r, &s, 5);
			expect_buf(&r, 1, 5);
			expect_fault(&r, VQ_USED_ID, s.id, 0);
			rig_free(&r);
		}
	}
}

static void test_used_jump(void)
{
	for (unsigned out = 0; out < 5; out++) {
		for (unsigned jump = 0; jump < 65536; jump += jump < 8 ? 1 : 4099) {
			struct options o = { .num = 8, .has_base = true, .base = 0xfffe };
			struct rig r;

			set_context(&o);
			rig_init(&r, &o);
			for (unsigned i = 0; i < out; i++) {
				CHECK_EQ(virtqueue_add(&r.dq, two, 1, 0, i), i);
				r.used->ring[(0xfffe + i) % 8] = (struct vring_used_elem){ i, 0 };
			}
			r.used->idx = (uint16_t)(0xfffe + jump);
			if (jump <= out) {
				for (unsigned i = 0; i < jump; i++)
					expect_buf(&r, i, 0);
				expect_none(&r);
				r.used->idx--; /* and never backwards */
				expect_fault(&r, VQ_USED_JUMP, 0xffff, out - jump + 1);
			} else {
				expect_fault(&r, VQ_USED_JUMP, jump, out + 1);
			}
			rig_free(&r);
		}
	}
}

static void test_batch_not_covered(void)
{
	struct options o = { .num = 8, .in_order = true };
	struct rig r;

	set_context(&o);
	/* The element names the third chain, but the index says that one or two were used. */
	for (unsigned covered = 1; covered < 3; covered++) {
		rig_init(&r, &o);
		for (unsigned i = 0; i < 4; i++)
			CHECK_EQ(virtqueue_add(&r.dq, two, 1, 0, i), i);
		dev_use_batch(&r, 2, 0, covered, 0);
		expect_fault(&r, VQ_USED_BATCH, 2, covered);
		rig_free(&r);
	}
	/* One more than the batch has is the next element's. */
	rig_init(&r, &o);
	for (unsigned i = 0; i < 4; i++)
		virtqueue_add(&r.dq, two, 1, 1, i);
	r.used->ring[0] = (struct vring_used_elem){ 4, 1 };
	r.used->ring[3] = (struct vring_used_elem){ 6, 2 };
	r.used->idx = 4;
	expect_buf(&r, 0, 512);
	expect_buf(&r, 1, 512);
	CHECK(virtqueue_more_used(&r.dq));
	expect_buf(&r, 2, 1);
	expect_buf(&r, 3, 2);
	expect_none(&r);
	rig_free(&r);
}

/* The ring is the device's to write: whatever it scribbles over descriptors and avail ring, the
 * driver goes on laying out what it was asked to. */
static void test_scribbled_ring(void)
{
	for (unsigned bits = 0; bits < 4; bits++) {
		struct options o = { .packed = bits & 1, .in_order = bits & 2, .num = 8 };
		struct rig r;
		struct seen s;

		set_context(&o);
		rig_init(&r, &o);
		for (unsigned round = 0; round < 100; round++) {
			CHECK(add_two(&r, round) >= 0);
			CHECK(dev_pop(&r, &s));
			CHECK_EQ(s.n, 2);
			CHECK_EQ(s.bufs[1].addr, two[1].addr);
			if (!o.packed) {
				memset(r.desc, 0xff, 8 * 16);
				memset(r.avail->ring, 0xff, 16);
			} else {
				for (unsigned i = 0; i < 8; i++)
					memset(&r.pdesc[i], 0xff, 14);
			}
			dev_use(&r, &s, 3);
			expect_buf(&r, round, 3);
		}
		rig_free(&r);
	}
}

/* Random bytes anywhere in the ring at any time: the queue may break or stall, no more. */
static void test_noise(void)
{
	unsigned broken = 0, back = 0;

	for (unsigned round = 0; round < 4000; round++) {
		struct options o = { .packed = rnd(2),
				     .event_idx = rnd(2),
				     .in_order = rnd(2),
				     .indirect_max = rnd(2) * 3,
				     .num = 1u << rnd(5) };
		size_t sizes[3] = { vring_desc_size(o.num), vring_driver_size(o.num, o.packed),
				    vring_device_size(o.num, o.packed) };
		struct rig r;

		set_context(&o);
		rig_init(&r, &o);
		for (unsigned step = 0; step < 60; step++) {
			unsigned area = rnd(3), returned = 0;
			uint64_t token;
			uint32_t written;

			while (add_two(&r, 1) >= 0)
				;
			virtqueue_kick_prepare(&r.dq);
			for (unsigned k = rnd(8); k; k--) {
				uint8_t *byte = (uint8_t *)r.area[area] + rnd((uint32_t)sizes[area]);

				*byte = rnd(2) ? (uint8_t)rnd(4) : (uint8_t)rnd(256);
			}
			if (!rnd(4))
				dev_use_batch(&r, rnd(o.num), rnd(1000), 1, 1);
			while (virtqueue_get_buf(&r.dq, &token, &written) == 1) {
				CHECK_EQ(token, 1);
				CHECK(written <= 512);
				CHECK(++returned <= o.num); /* no more than were out */
			}
			back += returned;
			CHECK(r.dq.num_free <= o.num);
		}
		broken += r.dq.report.fault != VQ_OK;
		rig_free(&r);
	}
	CHECK(broken > 1000 && back > 1000); /* the noise does reach what it is meant to reach */
}

int main(void)
{
	RUN(test_init);
	RUN(test_add_layout);
	RUN(test_add_refuses);
	RUN(test_model);
	RUN(test_largest);
	RUN(test_kick_event);
	RUN(test_kick_flags);
	RUN(test_callbacks);
	RUN(test_base);
	RUN(test_id_range);
	RUN(test_id_not_out);
	RUN(test_used_jump);
	RUN(test_batch_not_covered);
	RUN(test_scribbled_ring);
	RUN(test_noise);
	return 0;
}
