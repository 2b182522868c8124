/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Marking. A byte at a time, for a log begins where the peer wants it to, and the byte is what the
 * specification counts in.
 *
 * A bit that is set already is set again. To look first would save the locked instruction, and lose
 * pages: our look may overtake our own write of the page, which is then seen neither by the one who took
 * the bit after our look nor by anybody later. A full barrier in between would help where the taker has one
 * of its own between its exchange and its reading of the page, which nobody promises us.
 */
#include "dirty_log.h"

static inline void mark_byte(const struct dirty_log *log, uint64_t byte, uint8_t bits)
{
	/* Pairs with the acquire of dirty_log_take, or of whatever the peer takes bits with. */
	__atomic_fetch_or(&log->map[byte], bits, __ATOMIC_RELEASE);
}

bool dirty_log_mark(const struct dirty_log *log, uint64_t guest_addr, uint64_t len)
{
	uint64_t first = guest_addr / DIRTY_LOG_PAGE;
	uint64_t last = (guest_addr + len - 1) / DIRTY_LOG_PAGE;
	/* In the first byte the bits from `first` on, in the last one those up to `last`. */
	uint8_t bits = (uint8_t)(0xffu << first % 8);

	if (!dirty_log_covers(log, guest_addr, len))
		return false;
	if (!len)
		return true;
	for (uint64_t byte = first / 8; byte < last / 8; byte++) {
		mark_byte(log, byte, bits);
		bits = 0xff;
	}
	mark_byte(log, last / 8, bits & (uint8_t)(0xffu >> (7 - last % 8)));
	return true;
}

bool dirty_log_mark_host(const struct dirty_log *log, const struct guest_memory *mem, const void *host,
			 uint64_t len, uint64_t *guest_addr)
{
	const uint8_t *at = host;

	*guest_addr = 0;
	while (len) {
		const struct guest_region *r = guest_memory_search_host(mem, at);
		uint64_t off, piece;

		if (!r)
			return false;
		off = (uint64_t)(at - r->host);
		piece = len < r->size - off ? len : r->size - off;
		*guest_addr = r->guest_addr + off;
		if (!dirty_log_mark(log, *guest_addr, piece))
			return false;
		at += piece;
		len -= piece;
	}
	return true;
}
