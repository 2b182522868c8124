/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * In-flight regions that lie: each lie alone, with the fault that it is, then any bytes at all, and a
 * front-end that writes to the region while a device runs on it. The region is what malloc gave, so that
 * ASan sees every byte too far.
 */
#include "device_rig.h"
#include "inflight.h"

#define NUM 8u
#define ENTRIES 11u /* more than the ring has; none of a split ring's may be in use */

static const bool formats[] = { false, true };

struct lie {
	const char *name;
	void (*tell)(struct rig *r, void *region);
	enum virtqueue_fault fault;
	bool at_pop; /* it shows only then */
};

static int init(struct rig *r, void *region, uint32_t entries)
{
	struct virtqueue_config cfg = rig_config(r, r->o.packed ? 0x80008000 : r->used->idx);

	cfg.inflight = region;
	cfg.inflight_num = entries;
	return virtqueue_init(&r->vq, &cfg);
}

static void *region_new(bool packed)
{
	/* Not more than what is looked at. */
	return calloc(1, packed ? 32 + ENTRIES * 32 : 16 + ENTRIES * 16);
}

static int add(struct rig *r, unsigned n)
{
	static const struct piece p[] = { { 0x10000, 16, 0 }, { 0x10100, 16, 0 }, { 0x10200, 16, W } };

	return rig_add(r, p, n);
}

/* Used 1, in flight 3 (of 2, 1 and 3 descriptors... as they fit), available 1; the device is gone. */
static void scene(struct rig *r, bool packed, void *region)
{
	rig_init(r, (struct options){ .packed = packed, .num = NUM });
	virtqueue_destroy(&r->vq);
	CHECK_EQ(init(r, region, ENTRIES), 0);
	add(r, 1);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 1);
	CHECK_EQ(virtqueue_push(&r->vq, r->chain.id, 0), 0);
	expect_used(r, r->chain.id, 0);
	add(r, 2);
	add(r, 1);
	add(r, 3);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 1);
	add(r, 1);
	virtqueue_destroy(&r->vq);
}

static struct inflight_split_region *split(void *region)
{
	return region;
}

static struct inflight_packed_region *packed(void *region)
{
	return region;
}

static unsigned first_set(void *region, bool is_packed)
{
	for (unsigned i = 0; i < ENTRIES; i++)
		if (is_packed ? packed(region)->desc[i].inflight : split(region)->desc[i].inflight)
			return i;
	CHECK(!"nothing is in flight");
	return 0;
}

/* The lies. Those with `r->o.packed` in them are told in both formats. */
static void version_2(struct rig *r, void *region)
{
	(void)r;
	split(region)->version = 2;
}

static void other_size(struct rig *r, void *region)
{
	(void)r;
	split(region)->desc_num = NUM;
}

static void flag_2(struct rig *r, void *region)
{
	unsigned i = first_set(region, r->o.packed);

	if (r->o.packed)
		packed(region)->desc[i].inflight = 2;
	else
		split(region)->desc[i].inflight = 2;
}

static void beyond_the_ring(struct rig *r, void *region)
{
	(void)r;
	split(region)->desc[ENTRIES - 1].inflight = 1;
}

static void all_in_flight(struct rig *r, void *region)
{
	(void)r;
	for (unsigned i = 0; i < NUM; i++)
		split(region)->desc[i].inflight = 1;
}

static void used_far_ahead(struct rig *r, void *region)
{
	split(region)->used_idx = r->used->idx + 1;
}

static void batch_outside(struct rig *r, void *region)
{
	split(region)->used_idx = r->used->idx - 1;
	split(region)->last_batch_head = 0xffff;
}

static void batch_loops(struct rig *r, void *region)
{
	unsigned i = first_set(region, false);

	split(region)->used_idx = r->used->idx - 2;
	split(region)->last_batch_head = i;
	split(region)->desc[i].next = i;
}

static void batch_runs_out(struct rig *r, void *region)
{
	unsigned i = first_set(region, false);

	split(region)->used_idx = r->used->idx - 2;
	split(region)->last_batch_head = i;
	split(region)->desc[i].next = NUM;
}

static void wrap_2(struct rig *r, void *region)
{
	(void)r;
	packed(region)->used.old_used_wrap_counter = 2;
}

static void used_outside(struct rig *r, void *region)
{
	(void)r;
	packed(region)->used.used_idx = NUM;
}

static void used_behind(struct rig *r, void *region)
{
	(void)r;
	packed(region)->used.used_idx--;
}

static void free_outside(struct rig *r, void *region)
{
	(void)r;
	packed(region)->free.old_free_head = ENTRIES + 1;
}

static void free_loops(struct rig *r, void *region)
{
	uint16_t head = packed(region)->free.old_free_head;

	(void)r;
	packed(region)->desc[head].next = head;
}

static void free_ends_early(struct rig *r, void *region)
{
	(void)r;
	packed(region)->desc[packed(region)->free.old_free_head].next = ENTRIES;
}

static void chain_of_none(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].num = 0;
}

static void chain_of_many(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].num = 0xffff;
}

static void chain_into_free(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].next = packed(region)->free.old_free_head;
}

static void chain_into_itself(struct rig *r, void *region)
{
	unsigned i = first_set(region, r->o.packed);

	packed(region)->desc[i].next = i;
}

static void chain_outside(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].next = 0x8000;
}

static void other_last(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].last++;
}

static void saved_open(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].flags ^= N;
}

static void saved_id(struct rig *r, void *region)
{
	packed(region)->desc[packed(region)->desc[first_set(region, r->o.packed)].last].id = NUM;
}

static void saved_address(struct rig *r, void *region)
{
	packed(region)->desc[first_set(region, r->o.packed)].addr = 0x7000000;
}

static void saved_twice(struct rig *r, void *region)
{
	struct inflight_packed_desc *desc = packed(region)->desc;
	unsigned a = first_set(region, true), b;

	(void)r;
	for (b = a + 1; !desc[b].inflight; b++)
		;
	desc[desc[a].last].id = desc[desc[b].last].id;
}

static const struct lie split_lies[] = {
	{ "version", version_2, VQ_INFLIGHT_VERSION, false },
	{ "size", other_size, VQ_INFLIGHT_SIZE, false },
	{ "flag", flag_2, VQ_INFLIGHT_FLAG, false },
	{ "entry beyond the ring", beyond_the_ring, VQ_INFLIGHT_INDEX, false },
	{ "more than was available", all_in_flight, VQ_INFLIGHT_COUNT, false },
	{ "used index", used_far_ahead, VQ_INFLIGHT_BATCH, false },
	{ "batch outside", batch_outside, VQ_INFLIGHT_INDEX, false },
	{ "batch loops", batch_loops, VQ_INFLIGHT_LIST, false },
	{ "batch runs out", batch_runs_out, VQ_INFLIGHT_INDEX, false },
};

static const struct lie packed_lies[] = {
	{ "version", version_2, VQ_INFLIGHT_VERSION, false },
	{ "size", other_size, VQ_INFLIGHT_SIZE, false },
	{ "flag", flag_2, VQ_INFLIGHT_FLAG, false },
	{ "wrap counter", wrap_2, VQ_INFLIGHT_FLAG, false },
	{ "used index outside", used_outside, VQ_INFLIGHT_INDEX, false },
	{ "used index behind", used_behind, VQ_INFLIGHT_BATCH, false },
	{ "free list outside", free_outside, VQ_INFLIGHT_INDEX, false },
	{ "free list loops", free_loops, VQ_INFLIGHT_LIST, false },
	{ "free list ends early", free_ends_early, VQ_INFLIGHT_LIST, false },
	{ "chain of nothing", chain_of_none, VQ_INFLIGHT_COUNT, false },
	{ "chain too long", chain_of_many, VQ_INFLIGHT_COUNT, false },
	{ "chain goes on in the free list", chain_into_free, VQ_INFLIGHT_LIST, false },
	{ "chain loops", chain_into_itself, VQ_INFLIGHT_LIST, false },
	{ "chain goes on outside", chain_outside, VQ_INFLIGHT_INDEX, false },
	{ "chain ends elsewhere", other_last, VQ_INFLIGHT_LIST, false },
	{ "saved flags", saved_open, VQ_INFLIGHT_CHAIN, true },
	{ "saved id", saved_id, VQ_ID_RANGE, true },
	{ "saved address", saved_address, VQ_ADDRESS, true },
	{ "the same id twice", saved_twice, VQ_ID_BUSY, true },
};

static void tell(const struct lie *lie, bool packed)
{
	void *region = region_new(packed);
	struct rig r;
	int rc;

	check_context = lie->name;
	scene(&r, packed, region);
	lie->tell(&r, region);
	rc = init(&r, region, ENTRIES);
	CHECK_EQ(rc, lie->at_pop ? 0 : -EBADMSG);
	if (lie->at_pop) {
		while ((rc = virtqueue_pop(&r.vq, &r.chain)) > 0)
			;
		CHECK_EQ(rc, -1);
	}
	CHECK_EQ(r.vq.report.fault, lie->fault);
	rig_destroy(&r);
	free(region);
}

static void test_lies(void)
{
	for (unsigned i = 0; i < sizeof(split_lies) / sizeof(split_lies[0]); i++)
		tell(&split_lies[i], false);
	for (unsigned i = 0; i < sizeof(packed_lies) / sizeof(packed_lies[0]); i++)
		tell(&packed_lies[i], true);
	check_context = "";
}

static void test_too_few_entries(void)
{
	for (unsigned i = 0; i < 2; i++) {
		void *region = region_new(formats[i]);
		struct rig r;

		rig_init(&r, (struct options){ .packed = formats[i], .num = NUM });
		virtqueue_destroy(&r.vq);
		CHECK_EQ(init(&r, region, NUM - 1), -EBADMSG);
		CHECK_EQ(r.vq.report.fault, VQ_INFLIGHT_SIZE);
		CHECK_EQ(init(&r, region, 0x10000), -EBADMSG);
		CHECK_EQ(init(&r, region, NUM), 0);
		rig_destroy(&r);
		free(region);
	}
}

/* Pops what there is, completes it, and takes nothing on trust. */
static void run_on(struct rig *r, void *region, size_t size, bool scribble)
{
	uint16_t ids[2 * NUM];
	unsigned n = 0;

	while (n < 2 * NUM && virtqueue_pop(&r->vq, &r->chain) > 0) {
		CHECK(r->chain.id < NUM);
		ids[n++] = r->chain.id;
		if (scribble)
			((uint8_t *)region)[rnd(size)] = rnd(256);
	}
	CHECK(n <= NUM); /* each has a slot of its own */
	while (n) {
		unsigned i = rnd(n);

		CHECK_EQ(virtqueue_fill(&r->vq, ids[i], 0), 0);
		ids[i] = ids[--n];
		if (rnd(2))
			virtqueue_flush(&r->vq);
		if (scribble)
			((uint8_t *)region)[rnd(size)] = rnd(256);
	}
	virtqueue_flush(&r->vq);
}

/* Whatever is in the region: it is refused, or the device runs. */
static void test_noise(void)
{
	unsigned refused = 0, rounds = 4000;

	for (unsigned i = 0; i < rounds; i++) {
		bool is_packed = i & 1;
		size_t size = is_packed ? 32 + ENTRIES * 32 : 16 + ENTRIES * 16;
		void *region = region_new(is_packed);
		struct rig r;

		scene(&r, is_packed, region);
		for (unsigned k = 1 + rnd(4); k; k--) {
			uint8_t *byte = (uint8_t *)region + rnd(size);

			*byte = rnd(2) ? rnd(256) : *byte ^ 1u << rnd(8);
		}
		if (!init(&r, region, ENTRIES))
			run_on(&r, region, size, false);
		else
			refused++;
		rig_destroy(&r);
		free(region);
	}
	CHECK(refused > rounds / 10 && refused < rounds * 9 / 10);
}

/* What the front-end writes to the region of a running device is the front-end's loss: the ring is as it
 * would be without. */
static void test_scribbled_while_it_runs(void)
{
	for (unsigned i = 0; i < 2000; i++) {
		bool is_packed = i & 1;
		size_t size = is_packed ? 32 + ENTRIES * 32 : 16 + ENTRIES * 16;
		void *region = region_new(is_packed);
		struct rig r;

		rig_init(&r, (struct options){ .packed = is_packed, .num = NUM });
		virtqueue_destroy(&r.vq);
		CHECK_EQ(init(&r, region, ENTRIES), 0);
		for (unsigned k = 0; k < 6; k++) {
			uint16_t id;
			uint32_t len;

			while (add(&r, 1 + rnd(3)) >= 0)
				;
			run_on(&r, region, size, true);
			CHECK_EQ(r.vq.report.fault, 0);
			while (rig_used(&r, &id, &len))
				;
			CHECK_EQ(r.free, NUM);
		}
		rig_destroy(&r);
		free(region);
	}
}

/* A device that is new to a region begins it; what lies in there from before means nothing. */
static void test_first_use(void)
{
	for (unsigned i = 0; i < 2; i++) {
		size_t size = formats[i] ? 32 + ENTRIES * 32 : 16 + ENTRIES * 16;
		void *region = region_new(formats[i]);
		struct rig r;

		memset(region, 0xff, size);
		split(region)->version = 0;
		rig_init(&r, (struct options){ .packed = formats[i], .num = NUM });
		virtqueue_destroy(&r.vq);
		CHECK_EQ(init(&r, region, ENTRIES), 0);
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 0);
		CHECK_EQ(split(region)->version, INFLIGHT_VERSION);
		CHECK_EQ(split(region)->desc_num, ENTRIES);
		rig_destroy(&r);
		free(region);
	}
}

/* What was not popped again yet is work, and a broken queue gives none of it. */
static void test_pending_is_work(void)
{
	for (unsigned i = 0; i < 2; i++) {
		void *region = region_new(formats[i]);
		struct rig r;
		uint16_t id;
		int n = 0;

		scene(&r, formats[i], region);
		CHECK_EQ(init(&r, region, ENTRIES), 0);
		while (virtqueue_has_work(&r.vq)) {
			CHECK(virtqueue_enable_notification(&r.vq));
			CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
			id = r.chain.id;
			if (n == 1) {
				CHECK_EQ(virtqueue_unpop(&r.vq, &r.chain), 0);
				CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
				CHECK_EQ(r.chain.id, id);
			}
			n++;
		}
		CHECK_EQ(n, 4);
		rig_destroy(&r);
		free(region);
	}
}

int main(void)
{
	RUN(test_lies);
	RUN(test_too_few_entries);
	RUN(test_noise);
	RUN(test_scribbled_while_it_runs);
	RUN(test_first_use);
	RUN(test_pending_is_work);
	return 0;
}
