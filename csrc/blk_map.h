/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A file on tmpfs as memory of ours: what is there already is copied without a system call. Knows the file and
 * which of its pages are there; knows neither disks nor requests.
 *
 * A page that is touched here is there from then on. So only those are touched that the file has anyway: what
 * is read of a hole does not fill it, and nobody needs room that a full file system has no more.
 *
 * Whoever truncates the file makes our access to it a bus error. The owner has it watched over (sigbus.h), which
 * puts zero pages in its place: the copy at hand did not happen then, nor does any other. From then on it is all
 * up to system calls, which say what the file really does.
 */
#ifndef VHOST_BLK_MAP_H
#define VHOST_BLK_MAP_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_span.h"

struct blk_map {
	char *base;
	uint64_t size; /* of the file, when it was mapped */
	int broken;    /* atomic: set by who watches over it */
	/* One for each chunk of pages: a bit for each that is there, and one that they were looked for. Atomic, one
	 * by one, and hints: a wrong one costs a page or a system call. */
	uint32_t chunks[];
};

/* NULL: it cannot be had, for whatever reason. The descriptor is needed for this call only. */
struct blk_map *blk_map_new(int fd, bool read_only);

void blk_map_free(struct blk_map *m);

/* Of no use any more: somebody has truncated the file. */
static inline bool blk_map_broken(const struct blk_map *m)
{
	return LOAD_ACQUIRE(m->broken); /* pairs with the handler's release */
}

/* All of the span, from or to byte `at` of the file on, and true; or false, with nothing done that a system call
 * would not do again. */
bool blk_map_move(struct blk_map *m, bool write, const struct blk_span *s, uint64_t at);

/* What system calls did: there is something in these bytes, or a hole is about to be. */
void blk_map_filled(struct blk_map *m, uint64_t at, uint64_t len);
void blk_map_emptied(struct blk_map *m, uint64_t at, uint64_t len);

#endif
