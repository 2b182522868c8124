/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The driver's side of the rings against a model: random requests, used in any order, in batches
 * with IN_ORDER, through the wraps of all indices, and nothing lost or given back twice.
 */
#include "driver_rig.h"

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
	static const uint32_t split_nums[] = { 1, 2, 4, 64, 1024 };
	static const uint32_t packed_nums[] = { 1, 2, 3, 7, 100 };

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

int main(void)
{
	RUN(test_model);
	return 0;
}
