/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Each change writes the table anew, in one pass, to the spare array: so the work is bounded whatever a
 * peer sends, entries merge and split without a case of their own, and nothing is half changed.
 */
#include "iotlb.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* One change may split all entries, and is itself in as many pieces as memory has regions. */
#define ROOM (2u * IOTLB_MAX_ENTRIES + 2u * GUEST_MEMORY_MAX_REGIONS + 2u)
/* Evicted at once, so that a flood costs a pass over the table only now and then. */
#define EVICT (IOTLB_MAX_ENTRIES / 16u)

static uint64_t last_of(const struct iotlb_entry *e)
{
	return e->iova + (e->size - 1);
}

/* ------------------------------------------------------------------ writing the table anew */

struct rewrite {
	struct iotlb *tlb;
	uint32_t n;
};

static bool continues(const struct iotlb_entry *a, const struct iotlb_entry *b)
{
	return a->iova + a->size == b->iova && a->user_addr + a->size == b->user_addr &&
	       a->host + a->size == b->host && a->access == b->access;
}

static void emit(struct rewrite *w, struct iotlb_entry e)
{
	struct iotlb_entry *end = w->tlb->spare + w->n;

	if (w->n && continues(end - 1, &e)) {
		end[-1].size += e.size;
	} else {
		*end = e;
		w->n++;
	}
}

/* The part of the entry from `first` to `last`, which are in it. */
static struct iotlb_entry part(const struct iotlb_entry *e, uint64_t first, uint64_t last)
{
	uint64_t skip = first - e->iova;

	return (struct iotlb_entry){ first, last - first + 1, e->user_addr + skip, e->host + skip,
				     e->access };
}

static void emit_before(struct rewrite *w, const struct iotlb_entry *e, uint64_t first)
{
	if (e->iova < first)
		emit(w, part(e, e->iova, last_of(e) < first ? last_of(e) : first - 1));
}

static void emit_behind(struct rewrite *w, const struct iotlb_entry *e, uint64_t last)
{
	if (last_of(e) > last)
		emit(w, part(e, e->iova > last ? e->iova : last + 1, last_of(e)));
}

static void make_view(struct iotlb *tlb)
{
	struct guest_region *to = tlb->view.by_guest;
	uint32_t n = 0;

	for (uint32_t i = 0; i < tlb->nentries; i++) {
		const struct iotlb_entry *e = &tlb->entries[i];

		if (e->access == IOTLB_ACCESS_MASK)
			to[n++] = (struct guest_region){ e->iova, e->user_addr, e->size, e->host };
	}
	if (!n)
		to[0] = (struct guest_region){ 0 }; /* matches no address, as an empty guest_memory has it */
	tlb->view.nregions = n;
	memset(tlb->view.hint, 0, sizeof(tlb->view.hint));
}

static void finish(struct rewrite *w)
{
	struct iotlb *tlb = w->tlb;
	struct iotlb_entry *old = tlb->entries;

	tlb->entries = tlb->spare;
	tlb->spare = old;
	tlb->nentries = w->n;
	tlb->last = 0;
	make_view(tlb);
}

/* ------------------------------------------------------------------ life */

int iotlb_init(struct iotlb *tlb, struct guest_memory *memory)
{
	memset(tlb, 0, sizeof(*tlb));
	tlb->memory = memory;
	/* calloc: pages that no entry ever comes to cost nothing. */
	tlb->entries = calloc(ROOM, sizeof(*tlb->entries));
	tlb->spare = calloc(ROOM, sizeof(*tlb->spare));
	tlb->view.by_guest = calloc(ROOM, sizeof(*tlb->view.by_guest));
	tlb->view.hint_shift = GUEST_MEMORY_HINT_SHIFT_MIN;
	if (tlb->entries && tlb->spare && tlb->view.by_guest)
		return 0;
	iotlb_destroy(tlb);
	return -ENOMEM;
}

void iotlb_destroy(struct iotlb *tlb)
{
	free(tlb->entries);
	free(tlb->spare);
	free(tlb->view.by_guest);
	memset(tlb, 0, sizeof(*tlb));
}

/* ------------------------------------------------------------------ looking up */

/* The entry that holds the IOVA, or the first one behind it, or nentries. */
static uint32_t find(struct iotlb *tlb, uint64_t iova)
{
	uint32_t lo = 0, hi = tlb->nentries, last = READ_ONCE(tlb->last);

	if (last < hi && iova - tlb->entries[last].iova < tlb->entries[last].size)
		return last;
	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (last_of(&tlb->entries[mid]) < iova)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo < tlb->nentries)
		WRITE_ONCE(tlb->last, lo);
	return lo;
}

static const struct iotlb_entry *find_exact(struct iotlb *tlb, uint64_t iova)
{
	uint32_t i = find(tlb, iova);

	return i < tlb->nentries && tlb->entries[i].iova <= iova ? &tlb->entries[i] : NULL;
}

uint8_t *iotlb_at(struct iotlb *tlb, uint64_t iova, uint32_t access, uint64_t *len)
{
	const struct iotlb_entry *e = find_exact(tlb, iova);
	uint64_t off;

	if (!e || access & ~e->access)
		return NULL;
	off = iova - e->iova;
	if (*len > e->size - off)
		*len = e->size - off;
	return e->host + off;
}

struct iotlb_miss iotlb_missing(struct iotlb *tlb, uint64_t iova, uint64_t len, uint32_t access)
{
	uint64_t done = 0;

	while (done < len && iova + done >= iova) {
		const struct iotlb_entry *e = find_exact(tlb, iova + done);
		uint32_t lacks = e ? access & ~e->access : access;

		if (lacks)
			return (struct iotlb_miss){ iova + done, lacks };
		done += e->size - (iova + done - e->iova);
	}
	return (struct iotlb_miss){ 0, 0 };
}

uint8_t *iotlb_area(struct iotlb *tlb, uint64_t iova, uint64_t len, uint32_t access)
{
	uint8_t *area = NULL;
	uint64_t done = 0;

	while (done < len) {
		uint64_t piece = len - done;
		uint8_t *p = iova + done < iova ? NULL : iotlb_at(tlb, iova + done, access, &piece);

		if (!p || (area && p != area + done))
			return NULL;
		if (!area)
			area = p;
		done += piece;
	}
	return area;
}

uint64_t iotlb_read(struct iotlb *tlb, uint64_t iova, void *to, uint64_t len)
{
	uint64_t done = 0;

	while (done < len) {
		uint64_t piece = len - done, at = iova + done;
		uint8_t *p = at < iova ? NULL : iotlb_at(tlb, at, IOTLB_READ, &piece);

		if (!p)
			break;
		memcpy((uint8_t *)to + done, p, piece);
		done += piece;
	}
	return done;
}

/* ------------------------------------------------------------------ changing */

/* Writes what is mapped at `e`, whose bytes lie in one region, after *i entries of the table were dealt
 * with; those that it meets are dealt with then, but for the end of the last one. */
static void emit_over(struct rewrite *w, struct iotlb_entry e, uint32_t *i)
{
	struct iotlb *tlb = w->tlb;
	uint64_t at = e.iova, last = last_of(&e);

	for (; *i < tlb->nentries; ++*i) {
		const struct iotlb_entry *old = &tlb->entries[*i];
		uint64_t first = old->iova > at ? old->iova : at;
		uint64_t end = last_of(old) < last ? last_of(old) : last;

		if (last_of(old) < at)
			continue;
		if (old->iova > last)
			break;
		/* The same mapping: what it allows is added up. Otherwise it is as if it had not been there. */
		if (old->user_addr - old->iova == e.user_addr - e.iova && old->access & ~e.access) {
			struct iotlb_entry more = part(&e, first, end);

			more.access |= old->access;
			if (at < first)
				emit(w, part(&e, at, first - 1));
			emit(w, more);
			if (end == last)
				return;
			at = end + 1;
		}
		if (last_of(old) >= last)
			break;
	}
	emit(w, part(&e, at, last));
}

/* Entries from the hand on go, but for those of the newest mapping. */
static void evict(struct iotlb *tlb, uint64_t first, uint64_t last)
{
	struct rewrite w = { tlb, 0 };
	uint32_t n = tlb->nentries, start = tlb->hand % n;
	uint32_t count = n - IOTLB_MAX_ENTRIES + EVICT;

	for (uint32_t i = 0; i < n; i++) {
		const struct iotlb_entry *e = &tlb->entries[i];
		bool newest = e->iova <= last && last_of(e) >= first;

		if (newest || (i + n - start) % n >= count)
			emit(&w, *e);
	}
	tlb->hand = start < w.n ? start : 0;
	finish(&w);
}

int iotlb_update(struct iotlb *tlb, uint64_t iova, uint64_t size, uint64_t user_addr, uint32_t access)
{
	struct rewrite w = { tlb, 0 };
	uint64_t last = iova + (size - 1);
	uint64_t done = 0, piece;
	uint32_t i;

	if (!size || last < iova || user_addr + (size - 1) < user_addr || access & ~IOTLB_ACCESS_MASK)
		return -EINVAL;
	for (; done < size; done += piece) {
		piece = size - done;
		if (!guest_memory_user_at(tlb->memory, user_addr + done, &piece))
			return -EFAULT;
	}
	for (i = 0; i < tlb->nentries && last_of(&tlb->entries[i]) < iova; i++)
		emit(&w, tlb->entries[i]);
	if (i < tlb->nentries)
		emit_before(&w, &tlb->entries[i], iova);
	for (done = 0; done < size; done += piece) {
		struct iotlb_entry e = { iova + done, 0, user_addr + done, NULL, access };

		piece = size - done;
		e.host = guest_memory_user_at(tlb->memory, e.user_addr, &piece);
		e.size = piece;
		emit_over(&w, e, &i);
	}
	for (; i < tlb->nentries; i++)
		emit_behind(&w, &tlb->entries[i], last);
	finish(&w);
	/* A mapping in as many pieces as there is room for leaves nothing to evict but itself. */
	if (tlb->nentries > IOTLB_MAX_ENTRIES)
		evict(tlb, iova, last);
	if (tlb->nentries > IOTLB_MAX_ENTRIES)
		evict(tlb, 1, 0);
	return 0;
}

void iotlb_invalidate(struct iotlb *tlb, uint64_t iova, uint64_t size)
{
	struct rewrite w = { tlb, 0 };
	uint64_t last = size && size - 1 <= UINT64_MAX - iova ? iova + (size - 1) : UINT64_MAX;

	for (uint32_t i = 0; i < tlb->nentries; i++) {
		emit_before(&w, &tlb->entries[i], iova);
		emit_behind(&w, &tlb->entries[i], last);
	}
	finish(&w);
}

void iotlb_clear(struct iotlb *tlb)
{
	iotlb_invalidate(tlb, 0, 0);
}

void iotlb_set_memory(struct iotlb *tlb, struct guest_memory *memory)
{
	struct rewrite w = { tlb, 0 };

	tlb->memory = memory;
	for (uint32_t i = 0; i < tlb->nentries; i++) {
		struct iotlb_entry e = tlb->entries[i];
		uint64_t left = e.size;

		/* Where memory goes on elsewhere, so does a mapping; what that makes of an entry is bounded by
		 * leaving out the rest. */
		for (; left && w.n < IOTLB_MAX_ENTRIES; left -= e.size) {
			e.size = left;
			e.host = guest_memory_user_at(memory, e.user_addr, &e.size);
			if (!e.host)
				break;
			emit(&w, e);
			e.iova += e.size;
			e.user_addr += e.size;
		}
	}
	finish(&w);
}
