/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Guest memory: a sorted, immutable table of regions, and the translation of guest-physical and
 * user addresses to host pointers, and back. Knows nothing of rings, of who maps the regions or of when
 * they are unmapped: whoever keeps a table keeps its mappings alive.
 *
 * "User address" is the address of a byte in the front-end's process (vhost-user's ring addresses
 * are of this kind), "guest address" the guest-physical one that descriptors carry.
 */
#ifndef VHOST_GUEST_MEMORY_H
#define VHOST_GUEST_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "barrier.h"

#define GUEST_MEMORY_MAX_REGIONS 509u /* the kernel's vhost limit */
#define GUEST_MEMORY_HINTS 2048u
/* Stretches of 4 KiB to 128 MiB: beyond 256 GiB of address space, some share a hint. */
#define GUEST_MEMORY_HINT_SHIFT_MIN 12u
#define GUEST_MEMORY_HINT_SHIFT_MAX 27u

struct guest_region {
	uint64_t guest_addr;
	uint64_t user_addr;
	uint64_t size; /* > 0, neither address + size wraps */
	uint8_t *host; /* of the region's first byte */
};

struct guest_memory {
	uint32_t nregions;
	struct guest_region *by_guest; /* sorted by guest_addr */
	struct guest_region *by_user;  /* sorted by user_addr */
	struct guest_region *by_host;  /* sorted by host */
	/* Which region the last look-up in this stretch of guest addresses ended in; stretches are
	 * as long as it takes to have a hint for each. Only ever a guess, checked before use, so
	 * threads may overwrite each other's (relaxed accesses). */
	uint32_t hint_shift;
	uint16_t hint[GUEST_MEMORY_HINTS];
};

/*
 * Copies and sorts `regions`. 0, or -EINVAL (size 0, wrap), -E2BIG (too many), -EEXIST (overlap in
 * guest or user addresses), -ENOMEM; *bad is then the index of the culprit in `regions`.
 */
int guest_memory_init(struct guest_memory *mem, const struct guest_region *regions, uint32_t n,
		      uint32_t *bad);
void guest_memory_destroy(struct guest_memory *mem);

/* The region that holds the guest address, or NULL: the binary search behind the hint. */
const struct guest_region *guest_memory_search(struct guest_memory *mem, uint64_t guest_addr);

/* The region that holds the guest address most likely: to be checked. */
static inline const struct guest_region *guest_memory_guess(const struct guest_memory *mem,
							    uint64_t guest_addr)
{
	uint32_t slot = (guest_addr >> mem->hint_shift) % GUEST_MEMORY_HINTS;

	return &mem->by_guest[READ_ONCE(mem->hint[slot])];
}

/*
 * Host pointer of a guest address, or NULL. *len goes in as the bytes wanted and comes out as the
 * bytes that lie contiguously in that one region, at most what was wanted.
 */
static inline uint8_t *guest_memory_at(struct guest_memory *mem, uint64_t guest_addr, uint64_t *len)
{
	const struct guest_region *r = guest_memory_guess(mem, guest_addr);
	uint64_t off = guest_addr - r->guest_addr;

	if (unlikely(off >= r->size)) {
		r = guest_memory_search(mem, guest_addr);
		if (!r)
			return NULL;
		off = guest_addr - r->guest_addr;
	}
	if (unlikely(*len > r->size - off))
		*len = r->size - off;
	return r->host + off;
}

/* The same for a user address. A search, without a guess. */
uint8_t *guest_memory_user_at(struct guest_memory *mem, uint64_t user_addr, uint64_t *len);

/* The region that a host pointer points into, or NULL: the way back, for who wrote through one. */
const struct guest_region *guest_memory_search_host(const struct guest_memory *mem, const void *host);

/* Host pointer of `len` contiguous bytes at a guest or a user address, or NULL. For ring areas. */
uint8_t *guest_memory_area(struct guest_memory *mem, uint64_t guest_addr, uint64_t len);
uint8_t *guest_memory_user_area(struct guest_memory *mem, uint64_t user_addr, uint64_t len);

/* Guest address of a user address, or false. */
bool guest_memory_user_to_guest(struct guest_memory *mem, uint64_t user_addr, uint64_t *guest_addr);

/* Copies across region borders. Bytes copied: less than `len` where memory ends. */
uint64_t guest_memory_read(struct guest_memory *mem, uint64_t guest_addr, void *to, uint64_t len);
uint64_t guest_memory_write(struct guest_memory *mem, uint64_t guest_addr, const void *from,
			    uint64_t len);

#endif
