/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#define _GNU_SOURCE /* mincore */
#include "blk_map.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define CHUNK_SHIFT 4 /* pages, whose presence is found out together */
#define CHUNK_PAGES (1u << CHUNK_SHIFT)
#define CHUNK_BYTES ((uint64_t)CHUNK_PAGES << PAGE_SHIFT)
#define ALL 0xffffu
#define KNOWN 0x10000u /* the chunk was looked at */

/* Of others' files that we may only read, the kernel says that all is there (mincore(2)). */
static bool says_the_truth(const struct stat *st, bool read_only)
{
	return !read_only || st->st_uid == geteuid();
}

struct blk_map *blk_map_new(int fd, bool read_only)
{
	uint64_t size, chunks, i;
	struct blk_map *m;
	struct stat st;

	if (sysconf(_SC_PAGESIZE) != 1 << PAGE_SHIFT || fstat(fd, &st) ||
	    !S_ISREG(st.st_mode) || st.st_size <= 0 || !says_the_truth(&st, read_only))
		return NULL;
	size = st.st_size;
	chunks = (size - 1) / CHUNK_BYTES + 1;
	m = calloc(1, sizeof(*m) + chunks * sizeof(m->chunks[0]));
	if (!m)
		return NULL;
	m->size = size;
	m->base = mmap(NULL, size, read_only ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (m->base == MAP_FAILED) {
		free(m);
		return NULL;
	}
	/* As many blocks as it would have without a hole. */
	if ((uint64_t)st.st_blocks >= (size + (1u << PAGE_SHIFT) - 1) >> PAGE_SHIFT << (PAGE_SHIFT - 9))
		for (i = 0; i < chunks; i++)
			m->chunks[i] = ALL;
	return m;
}

void blk_map_free(struct blk_map *m)
{
	if (!m)
		return;
	munmap(m->base, m->size);
	free(m);
}

/* ------------------------------------------------------------------ what is there */

static uint32_t ask(const struct blk_map *m, uint64_t at, uint64_t len)
{
	unsigned char there[CHUNK_PAGES] = { 0 };
	uint32_t bits = 0;
	unsigned i;

	if (!mincore(m->base + at, len, there))
		for (i = 0; i < CHUNK_PAGES; i++)
			bits |= (uint32_t)(there[i] & 1) << i;
	return bits;
}

/* Others may write there: it is not looked at what they do. */
__attribute__((no_sanitize("thread"))) static void touch(const char *p)
{
	(void)*(const volatile char *)p;
}

/* Before a chunk is used first. The kernel maps what is around a page that is read, and not around one that is
 * written: with all of it there, two reads spare a page fault for each of its pages. */
static uint32_t look(struct blk_map *m, uint64_t chunk)
{
	uint64_t at = chunk * CHUNK_BYTES, len = m->size - at;
	uint32_t bits = READ_ONCE(m->chunks[chunk]) & ALL;

	if (len > CHUNK_BYTES)
		len = CHUNK_BYTES;
	if (bits != ALL)
		bits |= ask(m, at, len);
	if (bits == ALL) {
		touch(m->base + at);
		touch(m->base + at + len - 1);
	}
	return bits | __atomic_fetch_or(&m->chunks[chunk], bits | KNOWN, __ATOMIC_RELAXED);
}

/* The bits of pages `first` to `last` that are in a chunk. */
static uint32_t bits_of(uint64_t chunk, uint64_t first, uint64_t last)
{
	uint64_t start = chunk << CHUNK_SHIFT, end = start + CHUNK_PAGES - 1;
	unsigned from = first > start ? first - start : 0, to = last < end ? last - start : end - start;

	return (2u << to) - (1u << from);
}

static bool is_there(struct blk_map *m, uint64_t at, uint64_t len)
{
	uint64_t first = at >> PAGE_SHIFT, last = (at + len - 1) >> PAGE_SHIFT, chunk;
	uint32_t wanted, bits;

	for (chunk = first >> CHUNK_SHIFT; chunk <= last >> CHUNK_SHIFT; chunk++) {
		wanted = bits_of(chunk, first, last);
		bits = READ_ONCE(m->chunks[chunk]);
		if (unlikely(!(bits & KNOWN)))
			bits = look(m, chunk);
		if (wanted & ~bits)
			return false;
	}
	return true;
}

/* The part of it that is mapped; false if there is none. */
static bool clip(const struct blk_map *m, uint64_t at, uint64_t *len)
{
	if (!*len || at >= m->size)
		return false;
	if (*len > m->size - at)
		*len = m->size - at;
	return true;
}

void blk_map_filled(struct blk_map *m, uint64_t at, uint64_t len)
{
	uint64_t first = at >> PAGE_SHIFT, last, chunk;

	if (!clip(m, at, &len))
		return;
	last = (at + len - 1) >> PAGE_SHIFT;
	for (chunk = first >> CHUNK_SHIFT; chunk <= last >> CHUNK_SHIFT; chunk++)
		__atomic_fetch_or(&m->chunks[chunk], bits_of(chunk, first, last), __ATOMIC_RELAXED);
}

void blk_map_emptied(struct blk_map *m, uint64_t at, uint64_t len)
{
	uint64_t first = at >> PAGE_SHIFT, last, chunk;

	if (!clip(m, at, &len))
		return;
	last = (at + len - 1) >> PAGE_SHIFT;
	for (chunk = first >> CHUNK_SHIFT; chunk <= last >> CHUNK_SHIFT; chunk++)
		__atomic_fetch_and(&m->chunks[chunk], ~bits_of(chunk, first, last), __ATOMIC_RELAXED);
}

/* ------------------------------------------------------------------ moving */

bool blk_map_move(struct blk_map *m, bool write, const struct blk_span *s, uint64_t at)
{
	char *disk = m->base + at;
	uint32_t i;

	if (!s->len || at > m->size || s->len > m->size - at || blk_map_broken(m) ||
	    !is_there(m, at, s->len))
		return false;
	for (i = 0; i < s->num; i++) {
		if (write)
			memcpy(disk, s->iov[i].iov_base, s->iov[i].iov_len);
		else
			memcpy(s->iov[i].iov_base, disk, s->iov[i].iov_len);
		disk += s->iov[i].iov_len;
	}
	/* If any of it was zero pages of the handler's, it has said so before it put them there. */
	return !blk_map_broken(m);
}
