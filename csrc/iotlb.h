/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The IOTLB of a device behind an IOMMU (vhost-user, "IOMMU support"): which I/O virtual addresses (IOVAs)
 * the driver's side has mapped to which user addresses, and what may be done there. Knows memory, neither
 * rings nor who is asked for what is missing.
 *
 * `view` is what may be both read and written, as a table of guest memory: a ring takes it for its own, and
 * so translates with and without an IOMMU in the same way. What may only be read, or only be written, is
 * found behind it.
 *
 * Any number of threads may look something up; who changes an IOTLB sees to it that no ring uses it meanwhile.
 */
#ifndef VHOST_IOTLB_H
#define VHOST_IOTLB_H

#include <stdbool.h>
#include <stdint.h>

#include "guest_memory.h"

/* Any chain that a ring accepts has to fit (chain_max_pieces), and a peer that floods us with mappings
 * gets no more. */
#define IOTLB_MAX_ENTRIES 4096u

/* As vhost-user and the kernel's vhost have them on the wire. */
#define IOTLB_READ 1u
#define IOTLB_WRITE 2u
#define IOTLB_ACCESS_MASK (IOTLB_READ | IOTLB_WRITE)

struct iotlb_entry {
	uint64_t iova;
	uint64_t size; /* > 0, no sum wraps */
	uint64_t user_addr;
	uint8_t *host;
	uint32_t access;
};

struct iotlb {
	struct guest_memory view;
	struct guest_memory *memory; /* that user addresses lie in; whoever gave it keeps it */
	struct iotlb_entry *entries; /* sorted by IOVA; neighbours that are one mapping are one entry */
	struct iotlb_entry *spare;   /* what the next change is written to */
	uint32_t nentries;
	uint32_t last; /* where a look-up ended lately: a guess, of all threads */
	uint32_t hand; /* where the next eviction begins */
};

/* What an access needs and lacks. */
struct iotlb_miss {
	uint64_t iova;
	uint32_t access;
};

/* 0 or -ENOMEM. */
int iotlb_init(struct iotlb *tlb, struct guest_memory *memory);
void iotlb_destroy(struct iotlb *tlb);

/*
 * Map these bytes. Where the same mapping is there already, what it allows is added to that: a peer may
 * answer for reading and for writing apart. Any other mapping there is replaced. If there is no room,
 * others go: they are only missed again.
 * 0, -EINVAL (size 0, a sum wraps, no such access), -EFAULT (not wholly in memory; nothing changes).
 */
int iotlb_update(struct iotlb *tlb, uint64_t iova, uint64_t size, uint64_t user_addr, uint32_t access);

/* Unmap these bytes, of which those beyond 2^64 do not exist. Size 0 stands for 2^64. */
void iotlb_invalidate(struct iotlb *tlb, uint64_t iova, uint64_t size);
void iotlb_clear(struct iotlb *tlb);

/* The memory is another: what is mapped to user addresses that it does not have is unmapped. */
void iotlb_set_memory(struct iotlb *tlb, struct guest_memory *memory);

/* Host pointer of an IOVA that may be accessed in this way, or NULL. *len goes in as the bytes wanted, and
 * comes out as those of one entry. */
uint8_t *iotlb_at(struct iotlb *tlb, uint64_t iova, uint32_t access, uint64_t *len);

/* The first of these bytes that cannot be accessed in this way, and what that lacks: all of it, if nothing is
 * mapped there. access 0: nothing is missing. Bytes beyond 2^64 are not looked at. */
struct iotlb_miss iotlb_missing(struct iotlb *tlb, uint64_t iova, uint64_t len, uint32_t access);

/* Host pointer of an area of a ring, which may lie in several entries as long as they follow each other in
 * this process, too. NULL: they do not, or something is missing. */
uint8_t *iotlb_area(struct iotlb *tlb, uint64_t iova, uint64_t len, uint32_t access);

/* Copies across entries. Bytes copied: less than `len` where reading is not allowed. */
uint64_t iotlb_read(struct iotlb *tlb, uint64_t iova, void *to, uint64_t len);

#endif
