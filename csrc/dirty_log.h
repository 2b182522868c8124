/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The dirty log of a migration: a bit for each page of 4 KiB of guest memory, set by devices (the
 * kernel among them) while somebody else takes the bits away. Knows bits, not who shares them.
 */
#ifndef VHOST_DIRTY_LOG_H
#define VHOST_DIRTY_LOG_H

#include <stdint.h>

#define DIRTY_LOG_PAGE 0x1000

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
