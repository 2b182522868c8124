/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The dirty log of a migration: a bit for each page of 4 KiB of guest memory, set by devices (the
 * kernel among them) while somebody else takes the bits away. Knows bits, and which page a host pointer
 * is; knows neither who shares the log nor why something is written: virtqueue_log.h has that.
 *
 * A log is bounded, and of the peer's choice: its first byte may lie anywhere in a page, its size is
 * any, and nothing that a guest or a peer says makes us write outside.
 */
#ifndef VHOST_DIRTY_LOG_H
#define VHOST_DIRTY_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "guest_memory.h"

#define DIRTY_LOG_PAGE 0x1000

struct dirty_log {
	uint8_t *map;  /* bit n % 8 of byte n / 8 is that of page n (vhost-user, "Migration") */
	uint64_t size; /* bytes */
};

/* Are all of these bytes (none: they are) of pages that the log has a bit for? */
static inline bool dirty_log_covers(const struct dirty_log *log, uint64_t guest_addr, uint64_t len)
{
	uint64_t last = guest_addr + len - 1;

	return !len || (last >= guest_addr && last / DIRTY_LOG_PAGE / 8 < log->size);
}

/* The first guest address that the log has no bit for, for messages. */
static inline uint64_t dirty_log_limit(const struct dirty_log *log)
{
	return log->size > UINT64_MAX / (8 * DIRTY_LOG_PAGE) ? UINT64_MAX : log->size * 8 * DIRTY_LOG_PAGE;
}

/*
 * Sets the bits of the pages that these bytes are in, after they were written: whoever takes a bit sees
 * what was written before it was set (pairs with dirty_log_take). False, and nothing is set, if the log
 * does not cover them. From any thread.
 */
bool dirty_log_mark(const struct dirty_log *log, uint64_t guest_addr, uint64_t len);

/* The same for memory that the device knows by its host pointer, across borders of regions. False, with
 * *guest_addr where the log or the memory ends; what lies before that is marked. */
bool dirty_log_mark_host(const struct dirty_log *log, const struct guest_memory *mem, const void *host,
			 uint64_t len, uint64_t *guest_addr);

/* The bits of 64 pages, and none of them any more. What a device wrote before it set a bit is seen by
 * whoever takes it: pairs with the release, or stronger, of the one that sets it. */
static inline uint64_t dirty_log_take(uint64_t *word)
{
	/* Most words are clean, and a page of the log that nobody wrote stays unallocated. */
	if (!__atomic_load_n(word, __ATOMIC_RELAXED))
		return 0;
	return __atomic_exchange_n(word, 0, __ATOMIC_ACQ_REL);
}

#endif
