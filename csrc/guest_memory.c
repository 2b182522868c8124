/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Tables of regions: built once, sorted in each way that is searched, then only read. The hint is the one exception, and
 * a wrong hint costs a search, never a wrong answer.
 */
#include "guest_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int compare_guest(const void *a, const void *b)
{
	const struct guest_region *x = a, *y = b;

	return (x->guest_addr > y->guest_addr) - (x->guest_addr < y->guest_addr);
}

static int compare_user(const void *a, const void *b)
{
	const struct guest_region *x = a, *y = b;

	return (x->user_addr > y->user_addr) - (x->user_addr < y->user_addr);
}

static int compare_host(const void *a, const void *b)
{
	const struct guest_region *x = a, *y = b;

	return (x->host > y->host) - (x->host < y->host);
}

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
	return a < b ? b - a < a_size : a - b < b_size;
}

/* Quadratic, and only run to name the culprit of a table that the sorted check refused. */
static uint32_t find_overlap(const struct guest_region *r, uint32_t n)
{
	for (uint32_t i = 1; i < n; i++)
		for (uint32_t j = 0; j < i; j++)
			if (overlap(r[i].guest_addr, r[i].size, r[j].guest_addr, r[j].size) ||
			    overlap(r[i].user_addr, r[i].size, r[j].user_addr, r[j].size))
				return i;
	return 0;
}

static uint32_t choose_hint_shift(const struct guest_memory *mem)
{
	const struct guest_region *last = &mem->by_guest[mem->nregions - 1];
	uint64_t end = last->guest_addr + (last->size - 1);
	uint32_t shift = GUEST_MEMORY_HINT_SHIFT_MIN;

	while (shift < GUEST_MEMORY_HINT_SHIFT_MAX &&
	       (end >> shift) - (mem->by_guest->guest_addr >> shift) >= GUEST_MEMORY_HINTS)
		shift++;
	return shift;
}

int guest_memory_init(struct guest_memory *mem, const struct guest_region *regions, uint32_t n,
		      uint32_t *bad)
{
	struct guest_region *table;
	/* Never empty: an all-zero region matches no address, so look-ups need no special case. */
	uint32_t room = n ? n : 1;

	memset(mem, 0, sizeof(*mem));
	*bad = 0;
	if (n > GUEST_MEMORY_MAX_REGIONS)
		return -E2BIG;
	for (uint32_t i = 0; i < n; i++) {
		const struct guest_region *r = &regions[i];

		*bad = i;
		if (!r->size || r->guest_addr + (r->size - 1) < r->guest_addr ||
		    r->user_addr + (r->size - 1) < r->user_addr)
			return -EINVAL;
	}
	*bad = 0;
	table = calloc((size_t)room * 3, sizeof(*table));
	if (!table)
		return -ENOMEM;
	mem->by_guest = table;
	mem->by_user = table + room;
	mem->by_host = table + 2 * room;
	mem->nregions = n;
	if (n) {
		memcpy(mem->by_guest, regions, n * sizeof(*table));
		memcpy(mem->by_user, regions, n * sizeof(*table));
		qsort(mem->by_guest, n, sizeof(*table), compare_guest);
		qsort(mem->by_user, n, sizeof(*table), compare_user);
		memcpy(mem->by_host, regions, n * sizeof(*table));
		qsort(mem->by_host, n, sizeof(*table), compare_host);
	}
	for (uint32_t i = 1; i < n; i++) {
		const struct guest_region *g = &mem->by_guest[i], *u = &mem->by_user[i];

		if (g->guest_addr - g[-1].guest_addr < g[-1].size ||
		    u->user_addr - u[-1].user_addr < u[-1].size) {
			*bad = find_overlap(regions, n);
			guest_memory_destroy(mem);
			return -EEXIST;
		}
	}
	if (n)
		mem->hint_shift = choose_hint_shift(mem);
	return 0;
}

void guest_memory_destroy(struct guest_memory *mem)
{
	free(mem->by_guest);
	mem->by_guest = mem->by_user = mem->by_host = NULL;
	mem->nregions = 0;
}

/* Index of the last region that starts at or below the address, or nregions if none does. */
#define LAST_AT_OR_BELOW(table, field, address)                                                    \
	({                                                                                         \
		uint32_t lo_ = 0, hi_ = mem->nregions;                                             \
		while (lo_ < hi_) {                                                                \
			uint32_t mid_ = lo_ + (hi_ - lo_) / 2;                                     \
			if ((table)[mid_].field <= (address))                                      \
				lo_ = mid_ + 1;                                                    \
			else                                                                       \
				hi_ = mid_;                                                        \
		}                                                                                  \
		lo_ ? lo_ - 1 : mem->nregions;                                                     \
	})

const struct guest_region *guest_memory_search(struct guest_memory *mem, uint64_t guest_addr)
{
	uint32_t slot = (guest_addr >> mem->hint_shift) % GUEST_MEMORY_HINTS;
	uint32_t i = LAST_AT_OR_BELOW(mem->by_guest, guest_addr, guest_addr);

	if (i == mem->nregions || guest_addr - mem->by_guest[i].guest_addr >= mem->by_guest[i].size)
		return NULL;
	WRITE_ONCE(mem->hint[slot], (uint16_t)i);
	return &mem->by_guest[i];
}

static const struct guest_region *search_user(struct guest_memory *mem, uint64_t user_addr)
{
	uint32_t i = LAST_AT_OR_BELOW(mem->by_user, user_addr, user_addr);

	if (i == mem->nregions || user_addr - mem->by_user[i].user_addr >= mem->by_user[i].size)
		return NULL;
	return &mem->by_user[i];
}

const struct guest_region *guest_memory_search_host(const struct guest_memory *mem, const void *host)
{
	const uint8_t *at = host;
	uint32_t i = LAST_AT_OR_BELOW(mem->by_host, host, at);

	if (i == mem->nregions || (uint64_t)(at - mem->by_host[i].host) >= mem->by_host[i].size)
		return NULL;
	return &mem->by_host[i];
}

uint8_t *guest_memory_area(struct guest_memory *mem, uint64_t guest_addr, uint64_t len)
{
	uint64_t got = len;
	uint8_t *p = guest_memory_at(mem, guest_addr, &got);

	return got == len ? p : NULL;
}

uint8_t *guest_memory_user_at(struct guest_memory *mem, uint64_t user_addr, uint64_t *len)
{
	const struct guest_region *r = search_user(mem, user_addr);
	uint64_t off;

	if (!r)
		return NULL;
	off = user_addr - r->user_addr;
	if (*len > r->size - off)
		*len = r->size - off;
	return r->host + off;
}

uint8_t *guest_memory_user_area(struct guest_memory *mem, uint64_t user_addr, uint64_t len)
{
	uint64_t got = len;
	uint8_t *p = guest_memory_user_at(mem, user_addr, &got);

	return got == len ? p : NULL;
}

bool guest_memory_user_to_guest(struct guest_memory *mem, uint64_t user_addr, uint64_t *guest_addr)
{
	const struct guest_region *r = search_user(mem, user_addr);

	if (!r)
		return false;
	*guest_addr = r->guest_addr + (user_addr - r->user_addr);
	return true;
}

static uint64_t copy(struct guest_memory *mem, uint64_t guest_addr, uint8_t *to, const uint8_t *from,
		     uint64_t len)
{
	uint64_t done = 0;

	while (done < len) {
		uint64_t piece = len - done;
		uint64_t addr = guest_addr + done;
		uint8_t *p = addr < guest_addr ? NULL : guest_memory_at(mem, addr, &piece);

		if (!p)
			break;
		if (to)
			memcpy(to + done, p, piece);
		else
			memcpy(p, from + done, piece);
		done += piece;
	}
	return done;
}

uint64_t guest_memory_read(struct guest_memory *mem, uint64_t guest_addr, void *to, uint64_t len)
{
	return copy(mem, guest_addr, to, NULL, len);
}

uint64_t guest_memory_write(struct guest_memory *mem, uint64_t guest_addr, const void *from,
			    uint64_t len)
{
	return copy(mem, guest_addr, NULL, from, len);
}
