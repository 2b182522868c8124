/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The table of regions against a search that looks at every one of them: addresses at, around and far
 * from the borders, with hints that are cold, warm and wrong.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "guest_memory.h"

#define MAX GUEST_MEMORY_MAX_REGIONS

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd64(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static struct guest_region region(uint64_t guest, uint64_t user, uint64_t size)
{
	/* Addresses that are computed and never touched. */
	return (struct guest_region){ guest, user, size, (uint8_t *)(uintptr_t)(guest ^ 0x5a5a0000) };
}

static void refuse(const struct guest_region *r, uint32_t n, int want, uint32_t culprit)
{
	struct guest_memory mem;
	uint32_t bad = 0xdead;

	CHECK_EQ(guest_memory_init(&mem, r, n, &bad), want);
	CHECK_EQ(bad, culprit);
	guest_memory_destroy(&mem); /* of nothing, twice: harmless */
	guest_memory_destroy(&mem);
}

static void accept(const struct guest_region *r, uint32_t n)
{
	struct guest_memory mem;
	uint32_t bad;

	CHECK_EQ(guest_memory_init(&mem, r, n, &bad), 0);
	CHECK_EQ(mem.nregions, n);
	guest_memory_destroy(&mem);
}

static void test_tables_that_are_none(void)
{
	struct guest_region ok = region(0x1000, 0x9000, 0x1000), r[3] = { ok, ok, ok };
	static struct guest_region many[MAX + 1];

	r[1] = region(0x4000, 0x4000, 0);
	refuse(r, 2, -EINVAL, 1);
	r[1] = region(~0ull - 0xffe, 0x4000, 0x1000); /* one byte too many */
	refuse(r, 2, -EINVAL, 1);
	r[1] = region(0x4000, ~0ull, 2);
	refuse(r, 2, -EINVAL, 1);
	r[1] = region(0x4000, 0x4000, ~0ull);
	refuse(r, 2, -EINVAL, 1);
	/* The culprit is the first that does not fit those before it. */
	r[1] = region(0x4000, 0x4000, 0x1000);
	r[2] = region(0x1fff, 0x20000, 1);
	refuse(r, 3, -EEXIST, 2);
	r[2] = region(0, 0x20000, 0x1001);
	refuse(r, 3, -EEXIST, 2);
	r[2] = region(0, 0x20000, 0x100000);
	refuse(r, 3, -EEXIST, 2);
	r[2] = region(0x20000, 0x4fff, 0x1000);
	refuse(r, 3, -EEXIST, 2);
	refuse((struct guest_region[]){ ok, ok }, 2, -EEXIST, 1);
	for (uint32_t i = 0; i <= MAX; i++)
		many[i] = region(0x1000 * (uint64_t)i, 0x1000 * (uint64_t)i, 0x1000);
	accept(many, MAX);
	refuse(many, MAX + 1, -E2BIG, 0);
}

static void test_tables_that_just_are(void)
{
	/* Neighbours, and the last byte of all addresses. */
	struct guest_region r[3] = { region(0x1000, 0x1000, 0x1000), region(0x2000, 0x2000, 1),
				     region(~0ull - 0xfff, ~0ull - 0xfff, 0x1000) };
	uint64_t len = 0x1000, user;
	struct guest_memory mem;
	uint32_t bad;

	accept(r, 3);
	CHECK_EQ(guest_memory_init(&mem, r, 3, &bad), 0);
	CHECK(guest_memory_at(&mem, ~0ull, &len) == r[2].host + 0xfff);
	CHECK_EQ(len, 1);
	CHECK(guest_memory_area(&mem, ~0ull - 0xfff, 0x1000) == r[2].host);
	CHECK(!guest_memory_area(&mem, ~0ull - 0xfff, 0x1001));
	CHECK(!guest_memory_area(&mem, ~0ull, 2));
	CHECK(!guest_memory_area(&mem, 0x1fff, 2)); /* the next region is somewhere else */
	CHECK(!guest_memory_user_area(&mem, 0x1fff, 2));
	CHECK(guest_memory_user_area(&mem, 0x1fff, 1) == r[0].host + 0xfff);
	CHECK(!guest_memory_user_area(&mem, ~0ull - 0xfff, ~0ull));
	CHECK(guest_memory_user_to_guest(&mem, ~0ull, &user));
	CHECK(user == ~0ull);
	guest_memory_destroy(&mem);
}

static void test_no_regions(void)
{
	struct guest_memory mem;
	uint64_t len, guest;
	uint32_t bad;
	char byte;

	CHECK_EQ(guest_memory_init(&mem, NULL, 0, &bad), 0);
	for (uint64_t addr = 1; addr; addr <<= 1) {
		len = 1;
		CHECK(!guest_memory_at(&mem, addr, &len));
		len = 1;
		CHECK(!guest_memory_at(&mem, addr - 1, &len));
		CHECK(!guest_memory_user_area(&mem, addr, 1));
		CHECK(!guest_memory_user_to_guest(&mem, addr - 1, &guest));
	}
	len = 0;
	CHECK(!guest_memory_at(&mem, 0, &len));
	CHECK_EQ(guest_memory_read(&mem, 0, &byte, 1), 0);
	guest_memory_destroy(&mem);
}

static const struct guest_region *find(const struct guest_region *r, uint32_t n, uint64_t addr,
				       bool user)
{
	for (uint32_t i = 0; i < n; i++) {
		uint64_t start = user ? r[i].user_addr : r[i].guest_addr;

		if (addr >= start && addr - start < r[i].size)
			return &r[i];
	}
	return NULL;
}

static void look(struct guest_memory *mem, const struct guest_region *r, uint32_t n, uint64_t addr)
{
	const struct guest_region *g = find(r, n, addr, false), *u = find(r, n, addr, true);
	uint64_t want = rnd64() % 0x4000, len = want, guest;
	uint8_t *p = guest_memory_at(mem, addr, &len);

	if (g) {
		uint64_t left = g->size - (addr - g->guest_addr);

		CHECK(p == g->host + (addr - g->guest_addr));
		CHECK_EQ(len, want < left ? want : left);
	} else {
		CHECK(!p);
	}
	CHECK_EQ(guest_memory_user_to_guest(mem, addr, &guest), u != NULL);
	if (u)
		CHECK_EQ(guest, u->guest_addr + (addr - u->user_addr));
}

/* Regions of all sizes, in an order that is none, with gaps and without; user addresses the other way. */
static void test_against_a_plain_search(void)
{
	static const uint32_t counts[] = { 1, 2, 3, 8, 64, MAX };
	static struct guest_region r[MAX];

	for (unsigned c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
		for (unsigned scale = 1; scale <= 33; scale += 8) {
			uint32_t n = counts[c], bad;
			uint64_t guest = rnd64() % 0x10000, user = 1ull << 60;
			struct guest_memory mem;

			for (uint32_t i = 0; i < n; i++) {
				uint64_t size = 1 + (rnd64() % 0x4000) * (1ull << scale);

				guest += rnd64() % 2 ? 0 : rnd64() % (size + 1);
				user -= size + (rnd64() % 2);
				r[i] = region(guest, user, size);
				guest += size;
			}
			for (uint32_t i = n - 1; i; i--) {
				uint32_t j = (uint32_t)(rnd64() % (i + 1));
				struct guest_region swap = r[i];

				r[i] = r[j];
				r[j] = swap;
			}
			CHECK_EQ(guest_memory_init(&mem, r, n, &bad), 0);
			for (unsigned i = 0; i < 4000; i++) {
				const struct guest_region *at = &r[rnd64() % n];

				look(&mem, r, n, at->guest_addr + rnd64() % at->size);
				look(&mem, r, n, at->guest_addr + at->size - rnd64() % 2);
				look(&mem, r, n, at->guest_addr - rnd64() % 2);
				look(&mem, r, n, at->user_addr + at->size - rnd64() % 2);
				look(&mem, r, n, rnd64());
				/* Whatever another thread left there, it is a guess. */
				mem.hint[rnd64() % GUEST_MEMORY_HINTS] = (uint16_t)(rnd64() % n);
			}
			guest_memory_destroy(&mem);
		}
	}
}

static void test_copies_cross_borders(void)
{
	/* In guest addresses a, b, a gap, c; on the heap apart, so that ASan sees a byte too many. */
	uint8_t *a = calloc(1, 5), *b = calloc(1, 3), *c = calloc(1, 2), have[16];
	const char *text = "0123456789";
	struct guest_region r[3] = { { 100, 0, 5, a }, { 105, 50, 3, b }, { 110, 80, 2, c } };
	struct guest_memory mem;
	uint32_t bad;

	CHECK_EQ(guest_memory_init(&mem, r, 3, &bad), 0);
	CHECK_EQ(guest_memory_write(&mem, 100, text, 8), 8);
	CHECK(!memcmp(a, "01234", 5) && !memcmp(b, "567", 3));
	CHECK_EQ(guest_memory_read(&mem, 101, have, 7), 7);
	CHECK(!memcmp(have, "1234567", 7));
	CHECK_EQ(guest_memory_read(&mem, 107, have, 5), 1); /* up to the gap */
	CHECK_EQ(guest_memory_read(&mem, 108, have, 1), 0);
	CHECK_EQ(guest_memory_read(&mem, 99, have, 3), 0);
	CHECK_EQ(guest_memory_write(&mem, 111, text, 10), 1);
	CHECK_EQ(c[1], '0');
	CHECK_EQ(guest_memory_read(&mem, 100, have, 0), 0);
	guest_memory_destroy(&mem);

	/* From the last address it does not go on at the first. */
	r[0] = (struct guest_region){ 0, 0, 5, a };
	r[1] = (struct guest_region){ ~0ull - 2, ~0ull - 2, 3, b };
	CHECK_EQ(guest_memory_init(&mem, r, 2, &bad), 0);
	CHECK_EQ(guest_memory_read(&mem, ~0ull - 2, have, 5), 3);
	CHECK_EQ(guest_memory_write(&mem, ~0ull, text, 5), 1);
	guest_memory_destroy(&mem);
	free(a);
	free(b);
	free(c);
}

int main(void)
{
	RUN(test_tables_that_are_none);
	RUN(test_tables_that_just_are);
	RUN(test_no_regions);
	RUN(test_against_a_plain_search);
	RUN(test_copies_cross_borders);
	return 0;
}
