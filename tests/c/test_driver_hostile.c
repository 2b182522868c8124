/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A device that lies to the driver: each lie breaks the queue with its reason and its number.
 */
#include "driver_rig.h"

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
				if (o.packed) { /* which cannot be taken back */
					r.pdesc[0].flags = 0;
					expect_fault(&r, VQ_ID_RANGE, ids[i], 8);
				}
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
				r.used->idx++; /* which cannot be taken back */
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
				uint8_t *bytes = r.area[area];

				bytes[rnd((uint32_t)sizes[area])] = (uint8_t)rnd(rnd(2) ? 4 : 256);
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
	RUN(test_id_range);
	RUN(test_id_not_out);
	RUN(test_used_jump);
	RUN(test_batch_not_covered);
	RUN(test_scribbled_ring);
	RUN(test_noise);
	return 0;
}
