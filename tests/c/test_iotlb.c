/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The IOTLB: against a model that knows each byte by itself, and what a peer may send to spoil it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "iotlb.h"

#define SPACE 256u /* bytes of IOVA that the model has */
#define BASE 0x5000u
#define MEMORY 128u /* bytes of each of the two regions, which follow each other in user addresses */
#define USER 0x7f0000000000ull

static uint8_t low[MEMORY], high[MEMORY];
static struct guest_memory memory;

static void set_up_memory(void)
{
	struct guest_region regions[] = {
		{ 0x100000, USER, MEMORY, low },
		{ 0x200000, USER + MEMORY, MEMORY, high },
		{ 0x300000, 0xffffffff00000000ull, MEMORY, low },
	};
	uint32_t bad;

	CHECK_EQ(guest_memory_init(&memory, regions, 3, &bad), 0);
}

static void start(struct iotlb *tlb)
{
	set_up_memory();
	CHECK_EQ(iotlb_init(tlb, &memory), 0);
}

static void end(struct iotlb *tlb)
{
	iotlb_destroy(tlb);
	guest_memory_destroy(&memory);
}

static uint8_t *at(struct iotlb *tlb, uint64_t iova, uint32_t access)
{
	uint64_t len = 1;

	return iotlb_at(tlb, iova, access, &len);
}

static uint8_t *in_view(struct iotlb *tlb, uint64_t iova)
{
	uint64_t len = 1;

	return guest_memory_at(&tlb->view, iova, &len);
}

static void check_table(const struct iotlb *tlb)
{
	for (uint32_t i = 0; i < tlb->nentries; i++) {
		const struct iotlb_entry *e = &tlb->entries[i];

		CHECK(e->size && e->iova + (e->size - 1) >= e->iova);
		CHECK(!i || e[-1].iova + (e[-1].size - 1) < e->iova);
	}
	CHECK(tlb->nentries <= IOTLB_MAX_ENTRIES);
}

/* ------------------------------------------------------------------ one by one */

static void test_empty(void)
{
	struct iotlb tlb;
	uint64_t len = 1;

	start(&tlb);
	CHECK(!at(&tlb, 0, IOTLB_READ));
	CHECK(!at(&tlb, UINT64_MAX, IOTLB_READ));
	CHECK(!guest_memory_at(&tlb.view, 0, &len));
	CHECK(!iotlb_area(&tlb, 0, 8, IOTLB_READ));
	CHECK_EQ(iotlb_missing(&tlb, 7, 8, IOTLB_READ).iova, 7);
	CHECK_EQ(iotlb_missing(&tlb, 7, 8, IOTLB_READ).access, IOTLB_READ);
	iotlb_clear(&tlb);
	CHECK_EQ(tlb.nentries, 0);
	end(&tlb);
}

static void test_access(void)
{
	struct iotlb tlb;

	start(&tlb);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 16, USER, IOTLB_READ), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x2000, 16, USER, IOTLB_WRITE), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x3000, 16, USER, IOTLB_READ | IOTLB_WRITE), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x4000, 16, USER, 0), 0);
	CHECK(at(&tlb, 0x1000, IOTLB_READ) == low && !at(&tlb, 0x1000, IOTLB_WRITE));
	CHECK(!at(&tlb, 0x2000, IOTLB_READ) && at(&tlb, 0x2000, IOTLB_WRITE) == low);
	CHECK(at(&tlb, 0x3000, IOTLB_READ | IOTLB_WRITE) == low);
	CHECK(!at(&tlb, 0x4000, IOTLB_READ) && !at(&tlb, 0x4000, IOTLB_WRITE));
	/* The ring's own table has what may be used without asking. */
	CHECK(!in_view(&tlb, 0x1000) && !in_view(&tlb, 0x2000) && !in_view(&tlb, 0x4000));
	CHECK(in_view(&tlb, 0x300f) == low + 15 && !in_view(&tlb, 0x3010));
	CHECK_EQ(iotlb_missing(&tlb, 0x1000, 16, 3).access, IOTLB_WRITE);
	CHECK_EQ(iotlb_missing(&tlb, 0x1000, 17, IOTLB_READ).iova, 0x1010);
	CHECK_EQ(iotlb_missing(&tlb, 0x4000, 1, 3).access, 3);
	end(&tlb);
}

/* A peer may answer for reading and for writing apart, and for the same pages. */
static void test_the_same_mapping_adds_up(void)
{
	struct iotlb tlb;

	start(&tlb);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 64, USER, IOTLB_READ), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x1010, 16, USER + 16, IOTLB_WRITE), 0);
	CHECK_EQ(tlb.nentries, 3);
	CHECK(at(&tlb, 0x1010, 3) == low + 16 && !at(&tlb, 0x100f, 3) && !at(&tlb, 0x1020, 3));
	CHECK(in_view(&tlb, 0x1010) == low + 16);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 64, USER, IOTLB_WRITE), 0);
	CHECK_EQ(tlb.nentries, 1);
	/* Less than there is takes nothing away. */
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 8, USER, 0), 0);
	CHECK(at(&tlb, 0x1000, 3) == low);
	/* Another mapping does. */
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 8, USER + 1, IOTLB_READ), 0);
	CHECK(at(&tlb, 0x1000, IOTLB_READ) == low + 1 && !at(&tlb, 0x1000, IOTLB_WRITE));
	CHECK(at(&tlb, 0x1008, 3) == low + 8);
	end(&tlb);
}

static void test_neighbours_are_one(void)
{
	struct iotlb tlb;

	start(&tlb);
	for (uint64_t i = 0; i < 8; i += 2)
		CHECK_EQ(iotlb_update(&tlb, 0x1000 + i, 1, USER + i, 3), 0);
	CHECK_EQ(tlb.nentries, 4);
	for (uint64_t i = 1; i < 8; i += 2)
		CHECK_EQ(iotlb_update(&tlb, 0x1000 + i, 1, USER + i, 3), 0);
	CHECK_EQ(tlb.nentries, 1);
	CHECK(iotlb_area(&tlb, 0x1000, 8, 3) == low);
	iotlb_invalidate(&tlb, 0x1003, 2);
	CHECK_EQ(tlb.nentries, 2);
	CHECK(at(&tlb, 0x1002, 3) && !at(&tlb, 0x1003, 3) && !at(&tlb, 0x1004, 3) && at(&tlb, 0x1005, 3));
	end(&tlb);
}

static void test_across_regions(void)
{
	struct iotlb tlb;
	uint8_t copy[8];

	start(&tlb);
	memset(low, 1, sizeof(low));
	memset(high, 2, sizeof(high));
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 2 * MEMORY, USER, 3), 0);
	CHECK_EQ(tlb.nentries, high == low + MEMORY ? 1 : 2);
	CHECK(at(&tlb, 0x1000 + MEMORY, 3) == high);
	CHECK_EQ(iotlb_read(&tlb, 0x1000 + MEMORY - 4, copy, 8), 8);
	CHECK_EQ(copy[3], 1);
	CHECK_EQ(copy[4], 2);
	CHECK_EQ(iotlb_read(&tlb, 0x1000 + 2 * MEMORY - 4, copy, 8), 4);
	/* An area has to be in one piece here, too. */
	CHECK(iotlb_area(&tlb, 0x1000 + MEMORY - 4, 4, 3));
	CHECK(!iotlb_area(&tlb, 0x1000 + MEMORY - 4, 8, 3) == (high != low + MEMORY));
	CHECK_EQ(iotlb_missing(&tlb, 0x1000 + MEMORY - 4, 8, 3).access, 0);
	end(&tlb);
}

static void test_refused(void)
{
	struct iotlb tlb;

	start(&tlb);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 16, USER, 3), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 0, USER, 3), -EINVAL);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 16, USER, 4), -EINVAL);
	CHECK_EQ(iotlb_update(&tlb, UINT64_MAX, 2, USER, 3), -EINVAL);
	CHECK_EQ(iotlb_update(&tlb, 0, 2, UINT64_MAX, 3), -EINVAL);
	CHECK_EQ(iotlb_update(&tlb, 0, 1ull << 63, USER, 3), -EFAULT);
	CHECK_EQ(iotlb_update(&tlb, 0, 1, USER - 1, 3), -EFAULT);
	CHECK_EQ(iotlb_update(&tlb, 0, 2 * MEMORY + 1, USER, 3), -EFAULT);
	/* And nothing of it is there. */
	CHECK_EQ(tlb.nentries, 1);
	CHECK(at(&tlb, 0x1000, 3) && !at(&tlb, 0, 3));
	end(&tlb);
}

static void test_the_end_of_the_address_space(void)
{
	struct iotlb tlb;
	uint8_t copy[8];

	start(&tlb);
	CHECK_EQ(iotlb_update(&tlb, UINT64_MAX - 15, 16, USER, 3), 0);
	CHECK_EQ(iotlb_update(&tlb, 0, 16, USER + 16, 3), 0);
	CHECK_EQ(tlb.nentries, 2);
	CHECK(at(&tlb, UINT64_MAX, 3) == low + 15 && at(&tlb, 0, 3) == low + 16);
	/* Nothing goes on at 0. */
	CHECK_EQ(iotlb_read(&tlb, UINT64_MAX - 3, copy, 8), 4);
	CHECK(!iotlb_area(&tlb, UINT64_MAX - 3, 8, 3));
	CHECK(iotlb_area(&tlb, UINT64_MAX - 3, 4, 3));
	CHECK_EQ(iotlb_missing(&tlb, UINT64_MAX - 3, 8, 3).access, 0);
	iotlb_invalidate(&tlb, UINT64_MAX, 100); /* of which one byte exists */
	CHECK(at(&tlb, UINT64_MAX - 1, 3) && !at(&tlb, UINT64_MAX, 3) && at(&tlb, 0, 3));
	iotlb_invalidate(&tlb, 0, UINT64_MAX);
	CHECK_EQ(tlb.nentries, 0);
	CHECK_EQ(iotlb_update(&tlb, UINT64_MAX, 1, USER, 3), 0);
	iotlb_invalidate(&tlb, 0, 0);
	CHECK_EQ(tlb.nentries, 0);
	end(&tlb);
}

static void test_other_memory(void)
{
	struct guest_region moved[] = { { 0x100000, USER, MEMORY / 2, high } };
	struct guest_memory other;
	struct iotlb tlb;
	uint32_t bad;

	start(&tlb);
	CHECK_EQ(guest_memory_init(&other, moved, 1, &bad), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x1000, 2 * MEMORY, USER, 3), 0);
	CHECK_EQ(iotlb_update(&tlb, 0x9000, 4, USER + 2 * MEMORY - 4, 1), 0);
	iotlb_set_memory(&tlb, &other);
	CHECK(at(&tlb, 0x1000, 3) == high && in_view(&tlb, 0x1000) == high);
	CHECK(!at(&tlb, 0x1000 + MEMORY / 2, 3) && !at(&tlb, 0x9000, 1));
	check_table(&tlb);
	iotlb_set_memory(&tlb, &memory);
	CHECK(at(&tlb, 0x1000, 3) == low);
	guest_memory_destroy(&other);
	end(&tlb);
}

/* ------------------------------------------------------------------ floods */

static void test_flood(void)
{
	struct iotlb tlb;
	uint32_t kept = 0, n = 3 * IOTLB_MAX_ENTRIES;

	start(&tlb);
	for (uint64_t i = 0; i < n; i++) {
		/* Neighbours that are not one. */
		CHECK_EQ(iotlb_update(&tlb, i, 1, USER + (i * 7) % MEMORY, i % 4 ? 3 : 1), 0);
		CHECK(at(&tlb, i, 1) == low + (i * 7) % MEMORY); /* the newest is never what goes */
		CHECK(tlb.nentries <= IOTLB_MAX_ENTRIES);
	}
	check_table(&tlb);
	for (uint64_t i = 0; i < n; i++) {
		uint8_t *p = at(&tlb, i, 1);

		CHECK(!p || p == low + (i * 7) % MEMORY);
		kept += !!p;
	}
	CHECK(kept > IOTLB_MAX_ENTRIES / 2);
	/* All of them are met by one that adds to each second, which doubles what they were. */
	iotlb_clear(&tlb);
	for (uint64_t i = 0; i < MEMORY; i += 2)
		CHECK_EQ(iotlb_update(&tlb, i, 1, USER + i, 1), 0);
	CHECK_EQ(iotlb_update(&tlb, 0, MEMORY, USER, 2), 0);
	CHECK_EQ(tlb.nentries, MEMORY);
	end(&tlb);
}

/* More pieces than there may be, of one mapping. */
static void test_memory_in_many_pieces(void)
{
	static struct guest_region regions[GUEST_MEMORY_MAX_REGIONS];
	static uint8_t bytes[2 * GUEST_MEMORY_MAX_REGIONS];
	struct guest_memory many;
	struct iotlb tlb;
	uint32_t bad;

	for (uint32_t i = 0; i < GUEST_MEMORY_MAX_REGIONS; i++)
		regions[i] = (struct guest_region){ 2 * i, USER + i, 1, bytes + 2 * i };
	CHECK_EQ(guest_memory_init(&many, regions, GUEST_MEMORY_MAX_REGIONS, &bad), 0);
	CHECK_EQ(iotlb_init(&tlb, &many), 0);
	for (uint64_t i = 0; i < 20; i++) {
		CHECK_EQ(iotlb_update(&tlb, i << 20, GUEST_MEMORY_MAX_REGIONS, USER, 3), 0);
		CHECK(at(&tlb, (i << 20) + 5, 3) == bytes + 10);
		check_table(&tlb);
	}
	iotlb_destroy(&tlb);
	guest_memory_destroy(&many);
}

/* ------------------------------------------------------------------ against a model */

struct cell {
	uint8_t *host; /* NULL: nothing is mapped */
	uint64_t user;
	uint32_t access;
};

static uint64_t seed = 1234567;

static uint32_t rnd(uint32_t below)
{
	seed = seed * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(seed >> 33) % below;
}

static void compare(struct iotlb *tlb, const struct cell *model)
{
	check_table(tlb);
	for (uint32_t i = 0; i < SPACE; i++) {
		const struct cell *c = &model[i];

		for (uint32_t access = 1; access <= 3; access++)
			CHECK(at(tlb, BASE + i, access) == (access & ~c->access ? NULL : c->host));
		CHECK(in_view(tlb, BASE + i) == (c->access == 3 ? c->host : NULL));
	}
	CHECK(!at(tlb, BASE - 1, 0) && !at(tlb, BASE + SPACE, 0));
}

static void test_against_a_model(void)
{
	static struct cell model[SPACE];
	struct iotlb tlb;

	start(&tlb);
	for (uint32_t round = 0; round < 20000; round++) {
		uint32_t first = rnd(SPACE), size = 1 + rnd(rnd(4) ? 12 : SPACE - first), user, access;

		if (size > SPACE - first)
			size = SPACE - first;
		if (rnd(3)) {
			/* Often one that continues or repeats what is there. */
			user = rnd(2) ? first : rnd(2 * MEMORY);
			if (user + size > 2 * MEMORY)
				size = 2 * MEMORY - user;
			access = rnd(4);
			CHECK_EQ(iotlb_update(&tlb, BASE + first, size, USER + user, access), 0);
			for (uint32_t i = 0; i < size; i++) {
				struct cell *c = &model[first + i];
				uint64_t at = USER + user + i;
				bool same = c->host && c->user == at;

				c->access = same ? c->access | access : access;
				c->user = at;
				c->host = user + i < MEMORY ? low + user + i : high + user + i - MEMORY;
			}
		} else {
			iotlb_invalidate(&tlb, BASE + first, size);
			for (uint32_t i = 0; i < size; i++)
				model[first + i] = (struct cell){ NULL, 0, 0 };
		}
		compare(&tlb, model);
	}
	end(&tlb);
}

int main(void)
{
	RUN(test_empty);
	RUN(test_access);
	RUN(test_the_same_mapping_adds_up);
	RUN(test_neighbours_are_one);
	RUN(test_across_regions);
	RUN(test_refused);
	RUN(test_the_end_of_the_address_space);
	RUN(test_other_memory);
	RUN(test_flood);
	RUN(test_memory_in_many_pieces);
	RUN(test_against_a_model);
	return 0;
}
