/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side with a driver that keeps the rules: what goes round comes round, in both formats
 * and in rings of all sizes, over every wrap.
 */
#include "device_rig.h"

/* A buffer of `len` bytes that borders on others of its kind: some cross from region 0 to region 1. */
static struct piece some_piece(uint16_t flags)
{
	return (struct piece){ 0x10000 + rnd(2 * REGION_SIZE - 64), 1 + rnd(64), flags };
}

static uint32_t some_chain(struct piece *p, unsigned n, uint32_t *in_len)
{
	unsigned out = rnd(n + 1);
	uint32_t out_len = 0;

	*in_len = 0;
	for (unsigned i = 0; i < n; i++) {
		p[i] = some_piece(i < out ? 0 : W);
		*(i < out ? &out_len : in_len) += p[i].len;
	}
	return out_len;
}

static uint8_t *host_of(struct rig *r, uint64_t addr)
{
	return addr < region_addr[1] ? r->host[0] + (addr - region_addr[0]) :
				       r->host[1] + (addr - region_addr[1]);
}

/* The chain's iovecs are the pieces' bytes, one by one. */
static void same_bytes(struct rig *r, const struct vhost_chain *c, const struct piece *p, unsigned n)
{
	uint32_t iov = 0;
	size_t at = 0;

	for (unsigned i = 0; i < n; i++) {
		for (uint32_t b = 0; b < p[i].len; b++) {
			CHECK(iov < c->out_num + c->in_num);
			CHECK((iov >= c->out_num) == !!(p[i].flags & W));
			CHECK((uint8_t *)c->iov[iov].iov_base + at == host_of(r, p[i].addr + b));
			if (++at == c->iov[iov].iov_len) {
				at = 0;
				iov++;
			}
		}
		CHECK_EQ(at, 0); /* no iovec belongs to two buffers */
	}
	CHECK_EQ(iov, c->out_num + c->in_num);
}

struct done {
	uint16_t id;
	uint32_t len;
};

/* What was staged is seen by the driver now, in that order, and not before. */
static unsigned publish(struct rig *r, const struct done *staged, unsigned n)
{
	expect_no_used(r);
	CHECK_EQ(r->vq.inuse, r->o.num - r->free);
	virtqueue_flush(&r->vq);
	for (unsigned i = 0; i < n; i++)
		expect_used(r, staged[i].id, staged[i].len);
	expect_no_used(r);
	CHECK_EQ(r->vq.inuse, r->o.num - r->free);
	return 0;
}

/* A chain of the driver's, and what the device makes of it. False if the ring has no room for it. */
static bool add_some(struct rig *r, struct done *out)
{
	/* Now and then more than a chain holds without memory of its own. */
	uint32_t most = rnd(4) ? 4 : 20, n = 1 + rnd(r->o.num < most ? r->o.num : most), in_len, out_len;
	struct piece p[20];
	int id;

	out_len = some_chain(p, n, &in_len);
	id = rig_add(r, p, n);
	CHECK_EQ(virtqueue_has_work(&r->vq), id >= 0);
	if (id < 0) {
		CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 0);
		return false;
	}
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 1);
	CHECK_EQ(r->chain.id, id);
	CHECK_EQ(r->chain.ndesc, n);
	CHECK_EQ(r->chain.out_len, out_len);
	CHECK_EQ(r->chain.in_len, in_len);
	same_bytes(r, &r->chain, p, n);
	*out = (struct done){ r->chain.id, in_len };
	return true;
}

/* Gives back what was collected, with what cannot be given back behind it: an id that does not exist, more
 * bytes than there is room for, a chain twice. */
static void fill_batch(struct rig *r, const struct done *todo, unsigned n)
{
	struct virtqueue_used used[MAX_NUM + 1];
	struct virtqueue_used wrong[] = { { r->o.num, 0 }, { 0xffffffff, 0 }, { n ? todo[0].id : 0, 0 } };

	for (unsigned i = 0; i < n; i++)
		used[i] = (struct virtqueue_used){ todo[i].id, todo[i].len };
	used[n] = wrong[rnd(n ? 3 : 2)];
	CHECK_EQ(virtqueue_fill_batch(&r->vq, used, n + 1), n);
}

/* Chains in, and out in any order, staged and published in lots of any size; `batches`: staged in such, too. */
static void churn(struct options o, bool batches)
{
	struct done out[MAX_NUM], staged[MAX_NUM];
	unsigned nout = 0, nstaged = 0, nfilled = 0;
	struct rig r;

	rig_init(&r, o);
	for (unsigned round = 0; round < 40 * o.num; round++) {
		bool full = !add_some(&r, &out[nout]);

		nout += !full;
		while (nout && (full || !rnd(3))) {
			unsigned i = rnd(nout);
			struct done d = { out[i].id, rnd(out[i].len + 1) };

			struct virtqueue_used much = { d.id, out[i].len + 1 };

			if (batches) {
				CHECK_EQ(virtqueue_fill_batch(&r.vq, &much, 1), 0);
			} else {
				CHECK_EQ(virtqueue_fill(&r.vq, d.id, out[i].len + 1), -ERANGE);
				CHECK_EQ(virtqueue_fill(&r.vq, d.id, d.len), 0);
				CHECK_EQ(virtqueue_fill(&r.vq, d.id, d.len), -EINVAL);
			}
			staged[nstaged++] = d;
			out[i] = out[--nout];
			full = full && rnd(4);
		}
		if (batches && (!nout || !rnd(2))) {
			fill_batch(&r, staged + nfilled, nstaged - nfilled);
			nfilled = nstaged;
		}
		if (nfilled == (batches ? nstaged : 0) && (!nout || !rnd(3)))
			nfilled = nstaged = publish(&r, staged, nstaged);
	}
	rig_destroy(&r);
}

static void churn_both_ways(struct options o)
{
	churn(o, false);
	churn(o, true);
}

static void test_round_trips(void)
{
	static const uint32_t split[] = { 1, 2, 4, 8, 64 }, packed[] = { 1, 2, 3, 5, 8, 13, 64 };

	check_context = "split";
	for (unsigned i = 0; i < 5; i++) {
		churn_both_ways((struct options){ .num = split[i] });
		churn_both_ways((struct options){ .num = split[i], .event_idx = true, .start = 65500 });
	}
	check_context = "split, swapped";
	for (unsigned i = 0; i < 5; i++)
		churn_both_ways((struct options){ .num = split[i], .swapped = true, .start = 65500 });
	check_context = "packed";
	for (unsigned i = 0; i < 7; i++)
		for (unsigned start = 0; start < packed[i]; start += 4)
			churn_both_ways((struct options){ .packed = true, .num = packed[i], .start = start });
}

static const struct piece small[2] = { { 0x10000, 16, 0 }, { 0x10100, 16, W } };

static void add_and_pop(struct rig *r, uint16_t *ids, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		CHECK(rig_add(r, small, 2) >= 0);
		CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 1);
		ids[i] = r->chain.id;
	}
}

/* 2.7.9, 2.8.8: whatever order they are done in. */
static void in_order(bool packed)
{
	struct rig r;
	uint16_t ids[4];

	rig_init(&r, (struct options){ .packed = packed, .num = packed ? 9 : 8, .in_order = true });
	for (int lap = 0; lap < 20; lap++) {
		add_and_pop(&r, ids, 4);
		CHECK_EQ(virtqueue_push(&r.vq, ids[2], 3), 0);
		CHECK_EQ(virtqueue_push(&r.vq, ids[1], 2), 0);
		expect_no_used(&r);
		CHECK_EQ(virtqueue_fill(&r.vq, ids[1], 2), -EINVAL);
		CHECK_EQ(r.vq.inuse, 8);
		CHECK_EQ(virtqueue_push(&r.vq, ids[0], 1), 0);
		for (unsigned i = 0; i < 3; i++)
			expect_used(&r, ids[i], i + 1);
		expect_no_used(&r);
		/* The newest goes back to the ring, and comes again. */
		CHECK_EQ(virtqueue_unpop(&r.vq, &r.chain), 0);
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
		CHECK_EQ(r.chain.id, ids[3]);
		CHECK_EQ(virtqueue_push(&r.vq, ids[3], 0), 0);
		expect_used(&r, ids[3], 0);
	}
	rig_destroy(&r);
}

static void unpop(bool packed)
{
	struct vhost_chain older;
	struct rig r;
	uint16_t ids[3];

	rig_init(&r, (struct options){ .packed = packed, .num = packed ? 7 : 8 });
	vhost_chain_init(&older);
	for (int lap = 0; lap < 20; lap++) {
		add_and_pop(&r, ids, 3);
		for (unsigned i = 3; i--;) {
			/* Only the newest, and those behind it in turn. */
			for (unsigned other = 0; other < 3; other++) {
				older.id = ids[other];
				if (other != i)
					CHECK_EQ(virtqueue_unpop(&r.vq, &older), -EINVAL);
			}
			older.id = ids[i];
			CHECK_EQ(virtqueue_unpop(&r.vq, &older), 0);
			CHECK_EQ(r.vq.inuse, 2 * i);
		}
		for (unsigned i = 0; i < 3; i++) {
			CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
			CHECK_EQ(r.chain.id, ids[i]);
		}
		CHECK_EQ(virtqueue_fill(&r.vq, ids[2], 0), 0);
		older.id = ids[1];
		CHECK_EQ(virtqueue_unpop(&r.vq, &older), -EINVAL); /* another came after it */
		CHECK_EQ(virtqueue_fill(&r.vq, ids[1], 0), 0);
		CHECK_EQ(virtqueue_push(&r.vq, ids[0], 0), 0);
		for (unsigned i = 3; i--;)
			expect_used(&r, ids[i], 0);
	}
	rig_destroy(&r);
}

/* Nothing is taken, and nothing is wrong. */
static void empty_batch(bool packed)
{
	struct vhost_chain *batch[1];
	struct rig r;

	rig_init(&r, (struct options){ .packed = packed, .num = 8 });
	batch[0] = &r.chain;
	CHECK_EQ(virtqueue_pop_batch(&r.vq, batch, 0), 0);
	CHECK(rig_add(&r, small, 2) >= 0);
	CHECK_EQ(virtqueue_pop_batch(&r.vq, batch, 0), 0);
	CHECK_EQ(r.vq.report.fault, VQ_OK);
	CHECK_EQ(virtqueue_pop_batch(&r.vq, batch, 1), 1);
	CHECK_EQ(virtqueue_fill_batch(&r.vq, NULL, 0), 0);
	rig_destroy(&r);
}

/* Given back together, with in_order: staged as far as their elders are. */
static void batch_in_order(bool packed)
{
	struct virtqueue_used used[2];
	struct rig r;
	uint16_t ids[3];

	rig_init(&r, (struct options){ .packed = packed, .num = packed ? 9 : 8, .in_order = true });
	for (int lap = 0; lap < 20; lap++) {
		add_and_pop(&r, ids, 3);
		used[0] = (struct virtqueue_used){ ids[2], 3 };
		used[1] = (struct virtqueue_used){ ids[1], 2 };
		CHECK_EQ(virtqueue_fill_batch(&r.vq, used, 2), 2);
		CHECK_EQ(virtqueue_fill_batch(&r.vq, used, 2), 0);
		virtqueue_flush(&r.vq);
		expect_no_used(&r);
		CHECK_EQ(virtqueue_push(&r.vq, ids[0], 1), 0);
		for (unsigned i = 0; i < 3; i++)
			expect_used(&r, ids[i], i + 1);
	}
	rig_destroy(&r);
}

/* What is given back is what is the oldest, as a device that serves one after the other does it. */
static void batch_of_the_oldest(bool packed)
{
	struct virtqueue_used used[5];
	struct rig r;
	uint16_t ids[4];

	rig_init(&r, (struct options){ .packed = packed, .num = packed ? 9 : 8, .in_order = true });
	for (int lap = 0; lap < 20; lap++) {
		unsigned early = (unsigned)lap % 5, n = 0;

		add_and_pop(&r, ids, 4);
		/* One of them may be done before the others; 4: none is. */
		if (early < 4)
			CHECK_EQ(virtqueue_push(&r.vq, ids[early], early + 1), 0);
		for (unsigned i = 0; i < 4; i++)
			if (i != early)
				used[n++] = (struct virtqueue_used){ ids[i], i + 1 };
		/* And not a second time, nor with more than there is room for. */
		used[n] = lap % 2 ? used[n - 1] : (struct virtqueue_used){ ids[early < 4 ? early : 0], 0 };
		if (n > 3)
			CHECK_EQ(virtqueue_fill_batch(&r.vq, &(struct virtqueue_used){ ids[0], 1000 }, 1), 0);
		CHECK_EQ(virtqueue_fill_batch(&r.vq, used, n + 1), n);
		virtqueue_flush(&r.vq);
		for (unsigned i = 0; i < 4; i++)
			expect_used(&r, ids[i], i + 1);
		expect_no_used(&r);
		CHECK_EQ(r.vq.order_count, 0);
	}
	rig_destroy(&r);
}

/* A fault behind good chains: those first, then the fault, and what is out can still be given back. */
static void batch_with_a_fault(bool packed)
{
	static const struct piece bad = { 0x90000, 16, 0 };
	struct vhost_chain chains[4], *batch[4];
	struct rig r;
	int ids[2];

	rig_init(&r, (struct options){ .packed = packed, .num = 8 });
	for (unsigned i = 0; i < 4; i++)
		vhost_chain_init(batch[i] = &chains[i]);
	ids[0] = rig_add(&r, small, 2);
	ids[1] = rig_add(&r, small, 2);
	rig_add(&r, &bad, 1);
	rig_add(&r, small, 2);
	CHECK_EQ(virtqueue_pop_batch(&r.vq, batch, 4), 2);
	CHECK_EQ(virtqueue_pop_batch(&r.vq, batch + 2, 2), -1);
	CHECK_EQ(r.vq.report.fault, VQ_ADDRESS);
	CHECK_EQ(r.vq.report.value, 0x90000);
	for (unsigned i = 0; i < 2; i++) {
		CHECK_EQ(chains[i].id, ids[i]);
		CHECK_EQ(virtqueue_push(&r.vq, chains[i].id, 16), 0);
		expect_used(&r, ids[i], 16);
	}
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), -1);
	rig_destroy(&r);
}

/* The driver's wish lies at any distance from what is published: told when it was passed, not else. */
static void event_index(bool packed)
{
	uint32_t num = packed ? 11 : 8;

	for (unsigned start = 0; start < num; start++) {
		for (unsigned count = 1; count <= num; count++) {
			for (unsigned wish = 0; wish < 2 * num; wish++) {
				struct rig r;
				uint16_t ids[11], at = start, event = start;
				bool wrap = true, event_wrap = true;

				rig_init(&r, (struct options){ .packed = packed, .num = num,
							       .event_idx = true,
							       .start = packed ? start : 65530 + start });
				r.vq.signalled_valid = true; /* the first time, nobody knows */
				at = event = r.next_used;
				step(&r, &event, &event_wrap, wish < num ? wish : num);
				step(&r, &event, &event_wrap, wish < num ? 0 : wish - num);
				for (unsigned i = 0; i < count; i++) {
					CHECK(rig_add(&r, small + 1, 1) >= 0);
					CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
					ids[i] = r.chain.id;
				}
				for (unsigned i = 0; i < count; i++)
					CHECK_EQ(virtqueue_push(&r.vq, ids[i], 0), 0);
				if (packed) {
					r.driver->off_wrap = event | event_wrap << 15;
					r.driver->flags = VRING_PACKED_EVENT_FLAG_DESC;
				} else {
					r.avail->ring[num] = event;
					r.avail->flags = VRING_AVAIL_F_NO_INTERRUPT; /* ignored */
				}
				step(&r, &at, &wrap, count);
				CHECK_EQ(virtqueue_should_notify(&r.vq), wish < count);
				CHECK(!virtqueue_should_notify(&r.vq));
				rig_destroy(&r);
			}
		}
	}
}

/* Nobody asked for longer than a lap (packed), or than an index has values (split): whatever the driver
 * wished for has been passed. */
static void event_long_ago(bool packed)
{
	uint32_t num = packed ? 7 : 8, most = packed ? num + 1 : 65536;

	for (unsigned wish = 0; wish < num; wish++) {
		struct rig r;
		uint16_t id;

		rig_init(&r, (struct options){ .packed = packed, .num = num, .event_idx = true });
		r.vq.signalled_valid = true;
		for (uint32_t i = 0; i < most; i++) {
			CHECK(rig_add(&r, small + 1, 1) >= 0);
			CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
			id = r.chain.id;
			CHECK_EQ(virtqueue_push(&r.vq, id, 0), 0);
			expect_used(&r, id, 0);
		}
		if (packed) {
			r.driver->off_wrap = wish | (wish & 1) << 15;
			r.driver->flags = VRING_PACKED_EVENT_FLAG_DESC;
		} else {
			r.avail->ring[num] = wish * 8191;
		}
		CHECK(virtqueue_should_notify(&r.vq));
		rig_destroy(&r);
	}
}

/* What the driver reads of our wishes, and that the last look is taken after saying so. */
static void kicks(bool packed, bool event_idx)
{
	uint16_t event;
	struct rig r;

	rig_init(&r, (struct options){ .packed = packed, .num = 8, .event_idx = event_idx });
	for (int lap = 0; lap < 30; lap++) {
		virtqueue_disable_notification(&r.vq);
		if (packed)
			CHECK_EQ(r.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
		else
			CHECK_EQ(r.used->flags, event_idx ? 0 : VRING_USED_F_NO_NOTIFY);
		CHECK(rig_add(&r, small, 2) >= 0);
		CHECK(virtqueue_enable_notification(&r.vq));
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
		CHECK_EQ(virtqueue_push(&r.vq, r.chain.id, 0), 0);
		expect_used(&r, r.chain.id, 0);
		CHECK(!virtqueue_enable_notification(&r.vq));
		if (packed) {
			CHECK_EQ(r.device->flags, event_idx ? VRING_PACKED_EVENT_FLAG_DESC :
							      VRING_PACKED_EVENT_FLAG_ENABLE);
			if (event_idx)
				CHECK_EQ(r.device->off_wrap, r.next_avail | r.avail_wrap << 15);
		} else {
			CHECK_EQ(r.used->flags, 0);
			memcpy(&event, &r.used->ring[8], sizeof(event));
			if (event_idx)
				CHECK_EQ(event, r.next_avail);
		}
	}
	rig_destroy(&r);
}

/* A successor goes on from the base, kicks on again, and owes the driver one call. */
static void successor(bool packed)
{
	struct options o = { .packed = packed, .num = packed ? 5 : 8, .event_idx = true };
	struct rig r;

	rig_init(&r, o);
	for (int lap = 0; lap < 40; lap++) {
		struct virtqueue_config cfg;
		uint16_t id;

		add_and_pop(&r, &id, 1);
		CHECK_EQ(virtqueue_push(&r.vq, id, 1), 0);
		virtqueue_disable_notification(&r.vq);
		cfg = rig_config(&r, virtqueue_base(&r.vq));
		virtqueue_destroy(&r.vq);
		CHECK_EQ(virtqueue_init(&r.vq, &cfg), 0);
		if (packed)
			CHECK(r.device->flags != VRING_PACKED_EVENT_FLAG_DISABLE);
		expect_used(&r, id, 1);
		if (packed)
			r.driver->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
		add_and_pop(&r, &id, 1);
		CHECK_EQ(virtqueue_push(&r.vq, id, 0), 0);
		CHECK(virtqueue_should_notify(&r.vq));
		expect_used(&r, id, 0);
	}
	rig_destroy(&r);
}

static void test_both_formats(void)
{
	for (int packed = 0; packed < 2; packed++) {
		check_context = packed ? "packed" : "split";
		in_order(packed);
		unpop(packed);
		empty_batch(packed);
		batch_in_order(packed);
		batch_of_the_oldest(packed);
		batch_with_a_fault(packed);
		event_index(packed);
		event_long_ago(packed);
		kicks(packed, false);
		kicks(packed, true);
		successor(packed);
	}
}

int main(void)
{
	RUN(test_round_trips);
	RUN(test_both_formats);
	return 0;
}
