/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A device's queue behind an IOTLB: what is missed leaves everything as it was, what is mapped later is served
 * then, and a ring that is unmapped is not touched, whatever is in flight.
 */
#include <errno.h>

#include "device_rig.h"

#define USER_OF(guest) ((guest) + (1 << 20)) /* as rig_init has it */
#define IOVA 0xabc0000000ull		     /* of guest address 0 */

static const struct options variants[] = {
	{ .num = 8, .indirect = true, .iommu = true },
	{ .num = 8, .indirect = true, .iommu = true, .event_idx = true, .start = 65533 },
	{ .num = 8, .indirect = true, .iommu = true, .in_order = true },
	{ .num = 8, .indirect = true, .iommu = true, .swapped = true, .event_idx = true, .start = 65533 },
	{ .num = 8, .indirect = true, .iommu = true, .swapped = true },
	{ .packed = true, .num = 7, .indirect = true, .iommu = true },
	{ .packed = true, .num = 7, .indirect = true, .iommu = true, .event_idx = true, .start = 5 },
	{ .packed = true, .num = 8, .indirect = true, .iommu = true, .in_order = true, .start = 7 },
};

static char context[80];

static void describe(const struct options *o)
{
	snprintf(context, sizeof(context), "%s%s%s from %u",
		 o->packed ? "packed" : o->swapped ? "swapped" : "split",
		 o->event_idx ? ", event_idx" : "", o->in_order ? ", in_order" : "", o->start);
	check_context = context;
}

static void map(struct rig *r, uint64_t guest, uint64_t size, uint32_t access)
{
	CHECK_EQ(iotlb_update(&r->tlb, IOVA + guest, size, USER_OF(guest), access), 0);
	virtqueue_retry(&r->vq);
}

static void expect_miss(struct rig *r, uint64_t iova, uint32_t access)
{
	struct vhost_chain *batch = &r->chain;
	struct virtqueue before = r->vq;

	for (int again = 0; again < 2; again++) {
		CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 0);
		CHECK_EQ(r->vq.report.fault, VQ_MISS);
		CHECK_EQ(r->vq.report.value, iova);
		CHECK_EQ(r->vq.report.limit, access);
	}
	CHECK_EQ(virtqueue_pop_batch(&r->vq, &batch, 1), 0);
	/* Nobody is to look again before there is news. */
	CHECK(!virtqueue_has_work(&r->vq));
	CHECK(!virtqueue_enable_notification(&r->vq));
	CHECK_EQ(r->vq.last_avail, before.last_avail);
	CHECK_EQ(r->vq.avail_wrap, before.avail_wrap);
	CHECK_EQ(r->vq.inuse, before.inuse);
	CHECK_EQ(r->vq.pops, before.pops);
}

static void expect_chain(struct rig *r, int id)
{
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 1);
	CHECK_EQ(r->chain.id, id);
}

/* ------------------------------------------------------------------ buffers */

static void buffers_are_missed_one_by_one(struct rig *r)
{
	const struct piece p[] = { { IOVA + 0x10010, 16, 0 }, { IOVA + 0x10ff0, 32, W } };
	int id = rig_add(r, p, 2);

	expect_miss(r, IOVA + 0x10010, IOTLB_READ);
	map(r, 0x10010, 16, IOTLB_READ);
	expect_miss(r, IOVA + 0x10ff0, IOTLB_WRITE);
	map(r, 0x10ff0, 16, IOTLB_WRITE);
	expect_miss(r, IOVA + 0x11000, IOTLB_WRITE); /* the rest of it */
	map(r, 0x11000, 0x1000, IOTLB_READ);
	expect_miss(r, IOVA + 0x11000, IOTLB_WRITE); /* which may be read, but not written */
	map(r, 0x11000, 0x1000, IOTLB_WRITE);
	expect_chain(r, id);
	CHECK_EQ(r->chain.out_num, 1);
	CHECK_EQ(r->chain.in_num, r->host[1] == r->host[0] + REGION_SIZE ? 1 : 2);
	CHECK(r->chain.iov[0].iov_base == r->host[0] + 0x10);
	CHECK(r->chain.iov[1].iov_base == r->host[0] + 0xff0);
	CHECK_EQ(virtqueue_push(&r->vq, r->chain.id, 32), 0);
	expect_used(r, id, 32);
	/* Mapped once, for all that follows, until it is taken back. */
	id = rig_add(r, p, 2);
	expect_chain(r, id);
	CHECK_EQ(virtqueue_push(&r->vq, r->chain.id, 1), 0);
	expect_used(r, id, 1);
	iotlb_invalidate(&r->tlb, IOVA + 0x10010, 1);
	rig_add(r, p, 2);
	expect_miss(r, IOVA + 0x10010, IOTLB_READ);
}

static void put_table(struct rig *r, uint64_t guest, const struct piece *p, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint8_t *to = r->host[guest < 0x11000 ? 0 : 1] + guest % REGION_SIZE + i * 16;
		uint16_t flags = p[i].flags | (i + 1 < n && !r->o.packed ? N : 0);
		uint16_t next = ORD16(r, i + 1);
		uint64_t addr = ORD64(r, p[i].addr);
		uint32_t len = ORD32(r, p[i].len);

		flags = ORD16(r, flags);
		memcpy(to, &addr, 8);
		memcpy(to + 8, &len, 4);
		memcpy(to + (r->o.packed ? 14 : 12), &flags, 2);
		memcpy(to + (r->o.packed ? 12 : 14), &next, 2);
	}
}

static void tables_are_missed_like_buffers(struct rig *r)
{
	const struct piece inner[] = { { IOVA + 0x80000, 16, 0 }, { IOVA + 0x80010, 16, W } };
	const struct piece p[] = { { IOVA + 0x10100, 32, I } };
	const struct piece bad[] = { { IOVA + 0x11008, 32, I } };
	int id = rig_add(r, p, 1);

	put_table(r, 0x10100, inner, 2);
	expect_miss(r, IOVA + 0x10100, IOTLB_READ);
	map(r, 0x10100, 20, IOTLB_READ);
	/* The first descriptor is there, and what it says is not. */
	expect_miss(r, IOVA + 0x80000, IOTLB_READ);
	map(r, 0x80000, 0x1000, 3);
	/* Part of the second one. */
	expect_miss(r, IOVA + 0x10114, IOTLB_READ);
	map(r, 0x10110, 32, IOTLB_READ);
	expect_chain(r, id);
	CHECK_EQ(r->chain.out_num + r->chain.in_num, 2);
	CHECK_EQ(virtqueue_push(&r->vq, r->chain.id, 16), 0);
	expect_used(r, id, 16);
	/* One that may be written, but not read. */
	put_table(r, 0x11008, inner, 2);
	id = rig_add(r, bad, 1);
	expect_miss(r, IOVA + 0x11008, IOTLB_READ);
	map(r, 0x11000, 64, IOTLB_WRITE);
	expect_miss(r, IOVA + 0x11008, IOTLB_READ);
	map(r, 0x11000, 64, 3);
	expect_chain(r, id);
}

/* Those that were there before a miss are served before it. */
static void a_batch_ends_at_a_miss(struct rig *r)
{
	const struct piece good = { IOVA + 0x10000, 16, W }, missed = { IOVA + 0x11000, 16, W };
	struct vhost_chain chains[3], *batch[3] = { &chains[0], &chains[1], &chains[2] };
	int first, second;

	for (int i = 0; i < 3; i++)
		vhost_chain_init(&chains[i]);
	map(r, 0x10000, 16, 3);
	first = rig_add(r, &good, 1);
	second = rig_add(r, &missed, 1);
	CHECK_EQ(virtqueue_pop_batch(&r->vq, batch, 3), 1);
	CHECK_EQ(chains[0].id, first);
	expect_miss(r, IOVA + 0x11000, IOTLB_WRITE);
	/* What is out can be given back meanwhile, and taken again. */
	CHECK_EQ(virtqueue_unpop(&r->vq, &chains[0]), 0);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 0);
	map(r, 0x11000, 16, 3);
	CHECK_EQ(virtqueue_pop_batch(&r->vq, batch, 3), 2);
	CHECK_EQ(chains[0].id, first);
	CHECK_EQ(chains[1].id, second);
	for (int i = 0; i < 3; i++)
		vhost_chain_destroy(&chains[i]);
}

/* What is no address at all stays a fault, and a fault stays. */
static void faults_stay_faults(struct rig *r)
{
	const struct piece p[] = { { UINT64_MAX - 7, 16, 0 } };

	CHECK_EQ(iotlb_update(&r->tlb, UINT64_MAX - 7, 8, USER_OF(0x10000), 3), 0);
	rig_add(r, p, 1);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), -1);
	CHECK_EQ(r->vq.report.fault, VQ_ADDRESS);
	virtqueue_retry(&r->vq);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), -1);
	virtqueue_unmap(&r->vq, IOVA, 1);
	CHECK_EQ(r->vq.report.fault, VQ_ADDRESS);
	virtqueue_map(&r->vq, &(struct virtqueue_areas){ r->desc, r->avail, r->used });
	CHECK_EQ(r->vq.report.fault, VQ_ADDRESS);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), -1);
}

/* ------------------------------------------------------------------ the ring */

static void *moved(void *old, size_t size)
{
	void *new = malloc(size);

	memcpy(new, old, size);
	free(old); /* and who touches it is caught */
	return new;
}

static void unmap_ring(struct rig *r)
{
	virtqueue_unmap(&r->vq, IOVA, IOTLB_READ);
	CHECK(!virtqueue_is_mapped(&r->vq));
	r->desc = moved(r->desc, r->o.num * sizeof(*r->desc));
	r->pdesc = (void *)r->desc;
	r->avail = moved(r->avail, vring_driver_size(r->o.num, r->o.packed));
	r->used = moved(r->used, vring_device_size(r->o.num, r->o.packed));
	r->driver = (void *)r->avail;
	r->device = (void *)r->used;
}

static void map_ring(struct rig *r)
{
	virtqueue_map(&r->vq, &(struct virtqueue_areas){ r->desc, r->avail, r->used });
	CHECK(virtqueue_is_mapped(&r->vq));
}

/* Whatever a device may do, while its ring is away. */
static void use_without_ring(struct rig *r)
{
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 0);
	CHECK_EQ(r->vq.report.fault, VQ_MISS);
	CHECK_EQ(r->vq.report.value, IOVA);
	CHECK(!virtqueue_has_work(&r->vq));
	virtqueue_disable_notification(&r->vq);
	CHECK(!virtqueue_enable_notification(&r->vq));
	CHECK(!virtqueue_should_notify(&r->vq));
	virtqueue_retry(&r->vq); /* a mapping of something else */
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), 0);
}

static void completions_wait_for_the_ring(struct rig *r)
{
	const struct piece p = { IOVA + 0x10000, 16, W };
	int ids[4];
	bool in_order = r->o.in_order;

	map(r, 0x10000, 16, 3);
	for (int lap = 0; lap < 40; lap++) {
		for (int i = 0; i < 4; i++) {
			ids[i] = rig_add(r, &p, 1);
			expect_chain(r, ids[i]);
		}
		/* One published, one staged, one given back while the ring is away, one not at all. */
		CHECK_EQ(virtqueue_push(&r->vq, ids[0], 1), 0);
		expect_used(r, ids[0], 1);
		CHECK_EQ(virtqueue_fill(&r->vq, ids[1], 2), 0);
		unmap_ring(r);
		use_without_ring(r);
		CHECK_EQ(virtqueue_push(&r->vq, ids[in_order ? 2 : 3], 3), 0);
		use_without_ring(r);
		expect_no_used(r);
		if (lap % 2) {
			map_ring(r);
			if (!r->o.event_idx)
				CHECK(virtqueue_should_notify(&r->vq));
			expect_used(r, ids[1], 2);
			expect_used(r, ids[in_order ? 2 : 3], 3);
			expect_no_used(r);
			CHECK_EQ(virtqueue_push(&r->vq, ids[in_order ? 3 : 2], 4), 0);
		} else {
			/* All of it while it is away, the last one only staged. */
			CHECK_EQ(virtqueue_fill(&r->vq, ids[in_order ? 3 : 2], 4), 0);
			map_ring(r);
			expect_no_used(r);
			virtqueue_flush(&r->vq);
			expect_used(r, ids[1], 2);
			expect_used(r, ids[in_order ? 2 : 3], 3);
		}
		expect_used(r, ids[in_order ? 3 : 2], 4);
		expect_no_used(r);
		CHECK_EQ(r->vq.inuse, 0);
	}
}

static void a_full_ring_waits(struct rig *r)
{
	const struct piece p = { IOVA + 0x10000, 16, W };
	int ids[MAX_NUM];

	map(r, 0x10000, 16, 3);
	for (unsigned i = 0; i < r->o.num; i++) {
		ids[i] = rig_add(r, &p, 1);
		expect_chain(r, ids[i]);
	}
	unmap_ring(r);
	for (unsigned i = 0; i < r->o.num; i++)
		CHECK_EQ(virtqueue_push(&r->vq, ids[i], i), 0);
	expect_no_used(r);
	map_ring(r);
	for (unsigned i = 0; i < r->o.num; i++)
		expect_used(r, ids[i], i);
	expect_no_used(r);
}

/* A used element stands for all slots of its chain; those behind its own are as the driver left them, or they
 * would be taken for available, or for used, in a later lap. */
static void slots_behind_an_element_stay(struct rig *r)
{
	const struct piece p[] = { { IOVA + 0x10000, 8, 0 }, { IOVA + 0x10008, 8, W } };

	map(r, 0x10000, 16, 3);
	for (int i = 0; r->o.packed && i < 40; i++) {
		unsigned second = (r->next_avail + 1u) % r->o.num;
		int id = rig_add(r, p, 2);
		uint16_t flags = r->pdesc[second].flags;

		expect_chain(r, id);
		if (i % 3)
			CHECK_EQ(virtqueue_fill(&r->vq, id, 8), 0);
		unmap_ring(r);
		if (!(i % 3))
			CHECK_EQ(virtqueue_fill(&r->vq, id, 8), 0);
		map_ring(r);
		virtqueue_flush(&r->vq);
		expect_used(r, id, 8);
		CHECK_EQ(r->pdesc[second].flags, flags);
		CHECK(!virtqueue_has_work(&r->vq));
	}
}

/* What the driver does meanwhile is found when the ring is back, and kicks are asked for as before. */
static void work_that_came_meanwhile(struct rig *r)
{
	const struct piece p = { IOVA + 0x10000, 16, W };
	int first, second;

	map(r, 0x10000, 16, 3);
	first = rig_add(r, &p, 1);
	CHECK(virtqueue_has_work(&r->vq)); /* split: it was looked at the index */
	unmap_ring(r);
	second = rig_add(r, &p, 1);
	use_without_ring(r);
	map_ring(r);
	CHECK(virtqueue_has_work(&r->vq));
	expect_chain(r, first);
	CHECK_EQ(virtqueue_unpop(&r->vq, &r->chain), 0);
	unmap_ring(r);
	map_ring(r);
	expect_chain(r, first);
	expect_chain(r, second);
}

/* Everything at once, by chance: nothing is lost, and nothing comes twice. */
static void anything_at_any_time(struct rig *r)
{
	int out[MAX_NUM], nout = 0, added = 0, seen = 0;
	bool away = false;
	uint16_t id;
	uint32_t len;

	for (int i = 0; i < 100000; i++) {
		uint64_t page = 0x10000 + rnd(32) * 0x100;

		switch (rnd(8)) {
		case 0: {
			const struct piece p[] = { { IOVA + page, 8, 0 },
						   { IOVA + 0x10000 + rnd(0x1ff0), 16, W } };

			added += rig_add(r, p, 2) >= 0;
			break;
		}
		case 1:
			map(r, page, 0x100, 1 + rnd(3));
			break;
		case 2:
			iotlb_invalidate(&r->tlb, IOVA + page, 0x100);
			break;
		case 3:
			away ? map_ring(r) : unmap_ring(r);
			away = !away;
			break;
		case 4:
			if (nout) {
				int which = r->o.in_order ? 0 : (int)rnd(nout);

				CHECK_EQ(virtqueue_fill(&r->vq, out[which], 16), 0);
				memmove(out + which, out + which + 1, (--nout - which) * sizeof(*out));
			}
			break;
		case 5:
			virtqueue_flush(&r->vq);
			break;
		case 6:
			while (rig_used(r, &id, &len)) {
				CHECK_EQ(len, 16);
				seen++;
			}
			break;
		default:
			if (virtqueue_pop(&r->vq, &r->chain) == 1)
				out[nout++] = r->chain.id;
			else if (!away && r->vq.report.fault == VQ_MISS && rnd(2))
				map(r, r->vq.report.value - IOVA, 8, (uint32_t)r->vq.report.limit);
			CHECK(!r->vq.report.fault || r->vq.report.fault == VQ_MISS);
		}
	}
	if (away)
		map_ring(r);
	map(r, 0x10000, 0x2000, 3);
	while (virtqueue_pop(&r->vq, &r->chain) == 1)
		out[nout++] = r->chain.id;
	for (int i = 0; i < nout; i++)
		CHECK_EQ(virtqueue_push(&r->vq, out[i], 16), 0);
	virtqueue_flush(&r->vq);
	while (rig_used(r, &id, &len))
		seen++;
	CHECK_EQ(seen, added);
	CHECK(added > 1000);
}

static void each(void (*test)(struct rig *))
{
	for (unsigned i = 0; i < sizeof(variants) / sizeof(*variants); i++) {
		struct rig r;

		describe(&variants[i]);
		rig_init(&r, variants[i]);
		test(&r);
		rig_destroy(&r);
	}
}

#define EACH(test)                                                                                 \
	do {                                                                                       \
		each(test);                                                                        \
		printf("ok %s\n", #test);                                                          \
	} while (0)

int main(void)
{
	EACH(buffers_are_missed_one_by_one);
	EACH(tables_are_missed_like_buffers);
	EACH(a_batch_ends_at_a_miss);
	EACH(faults_stay_faults);
	EACH(completions_wait_for_the_ring);
	EACH(a_full_ring_waits);
	EACH(slots_behind_an_element_stay);
	EACH(work_that_came_meanwhile);
	EACH(anything_at_any_time);
	return 0;
}
