/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The driver's side of the rings: what it lays out, what it refuses, where it starts and goes on.
 */
#include "driver_rig.h"

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
			if (o.packed) {
				uint32_t wrap = (2 * n / 5) & 1 ? 0 : 0x8000;

				CHECK_EQ(again.base, (2 * n % 5 | wrap) * 0x10001u);
			} else {
				CHECK_EQ(again.base, n);
			}
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

int main(void)
{
	RUN(test_init);
	RUN(test_add_layout);
	RUN(test_add_refuses);
	RUN(test_largest);
	RUN(test_base);
	return 0;
}
