/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * When the driver kicks, and when it lets itself be called.
 */
#include "driver_rig.h"

static void set_avail_event(struct rig *r, uint16_t event)
{
	memcpy(&r->used->ring[r->num], &event, sizeof(event));
}

static void dev_ask(struct rig *r, uint64_t at)
{
	if (r->packed) {
		r->device->off_wrap = at % r->num | ((at / r->num) & 1 ? 0 : 0x8000);
		r->device->flags = VRING_PACKED_EVENT_FLAG_DESC;
	} else {
		set_avail_event(r, (uint16_t)at);
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
				n = 70000; /* more than 16 bits can count */
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
				at = old + rnd((uint32_t)(added - old));
			if (at >= added + o.num)
				at = added;
			if (old > o.num && !rnd(4))
				at = old - 1 - rnd(o.num);
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

/* A batch is published at once and asked for at once: any of its elements counts. */
static void test_kick_batch(void)
{
	const struct virtqueue_request req = { two, 1, 1, 7 }, reqs[3] = { req, req, req };
	struct options o = { .event_idx = true };

	for (unsigned packed = 0; packed < 2; packed++) {
		for (uint64_t at = 0; at < 9; at++) {
			struct rig r;

			o.packed = packed;
			o.num = packed ? 9 : 8;
			set_context(&o);
			rig_init(&r, &o);
			dev_ask(&r, at);
			CHECK_EQ(virtqueue_add_batch(&r.dq, reqs, 3), 3);
			CHECK_EQ(virtqueue_kick_prepare(&r.dq), at < (packed ? 6 : 3));
			rig_free(&r);
		}
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
		set_avail_event(&r, event_idx ? 0 : 5);
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

int main(void)
{
	RUN(test_kick_event);
	RUN(test_kick_batch);
	RUN(test_kick_flags);
	RUN(test_callbacks);
	return 0;
}
