/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Marking. The specification counts in bytes, and a log begins and ends where the peer wants it to; but
 * where it is made of words, which it nearly always is, those who take its bits take words, and atomic
 * operations of one size are what memory models know to order. (Little-endian words: see vring.h.)
 *
 * A bit that is set already is set again. To look first would save the locked instruction, and lose
 * pages: our look may overtake our own write of the page, which is then seen neither by the one who took
 * the bit after our look nor by anybody later. A full barrier in between would help where the taker has one
 * of its own between its exchange and its reading of the page, which nobody promises us.
 */
#include "dirty_log.h"

/* The bits of pages `first` to `last`, in units of a type. Pairs with the acquire of dirty_log_take, or of
 * whatever the peer takes bits with. */
#define MARK_UNITS(type, map, first, last)                                                         \
	do {                                                                                       \
		uint64_t const per_ = 8 * sizeof(type), end_ = (last) / per_;                      \
		type *units_ = (type *)(map), all_ = (type)~(type)0;                               \
		type bits_ = (type)(all_ << (first) % per_);                                       \
		for (uint64_t unit_ = (first) / per_; unit_ < end_; unit_++) {                     \
			__atomic_fetch_or(&units_[unit_], bits_, __ATOMIC_RELEASE);                \
			bits_ = all_;                                                              \
		}                                                                                  \
		bits_ &= (type)(all_ >> (per_ - 1 - (last) % per_));                               \
		__atomic_fetch_or(&units_[end_], bits_, __ATOMIC_RELEASE);                         \
	} while (0)

bool dirty_log_mark(const struct dirty_log *log, uint64_t guest_addr, uint64_t len)
{
	uint64_t first = guest_addr / DIRTY_LOG_PAGE;
	uint64_t last = (guest_addr + len - 1) / DIRTY_LOG_PAGE;

	if (!dirty_log_covers(log, guest_addr, len))
		return false;
	if (!len)
		return true;
	if (likely(!((uintptr_t)log->map % 8 || log->size % 8)))
		MARK_UNITS(uint64_t, log->map, first, last);
	else
		MARK_UNITS(uint8_t, log->map, first, last);
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
