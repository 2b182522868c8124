/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What lies in guest memory: the wire structs and flags of VIRTIO 1.2, chapters 2.7 (split
 * virtqueues) and 2.8 (packed virtqueues). Layout only, no behaviour.
 */
#ifndef VHOST_VRING_H
#define VHOST_VRING_H

#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
	       "rings are little-endian (VIRTIO 1.2, 1.4); a big-endian host would need swaps");

/* Descriptor flags, both formats (2.7.5, 2.8.1). */
#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4
/* Packed descriptors only (2.8.1): which side the slot belongs to, in terms of wrap counters. */
#define VRING_PACKED_DESC_F_AVAIL (1 << 7)
#define VRING_PACKED_DESC_F_USED (1 << 15)

#define VRING_AVAIL_F_NO_INTERRUPT 1 /* split, driver -> device (2.7.7) */
#define VRING_USED_F_NO_NOTIFY 1     /* split, device -> driver (2.7.10) */

/* Packed event suppression (2.8.10). Value 3 is reserved. */
#define VRING_PACKED_EVENT_FLAG_ENABLE 0
#define VRING_PACKED_EVENT_FLAG_DISABLE 1
#define VRING_PACKED_EVENT_FLAG_DESC 2
#define VRING_PACKED_EVENT_WRAP (1 << 15)

#define VRING_SPLIT_NUM_MAX 32768u
#define VRING_PACKED_NUM_MAX 32768u

struct vring_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct vring_avail {
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[]; /* num heads, then used_event with VIRTIO_F_EVENT_IDX */
};

struct vring_used_elem {
	uint32_t id;
	uint32_t len;
};

struct vring_used {
	uint16_t flags;
	uint16_t idx;
	struct vring_used_elem ring[]; /* num elements, then uint16_t avail_event */
};

struct vring_packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

/* off_wrap and flags of one side; off_wrap is read once, as 16 bits. */
struct vring_packed_desc_event {
	uint16_t off_wrap;
	uint16_t flags;
};

_Static_assert(sizeof(struct vring_desc) == 16, "2.7.5");
_Static_assert(sizeof(struct vring_packed_desc) == 16, "2.8.13");
_Static_assert(offsetof(struct vring_packed_desc, flags) == 14, "2.8.13");
_Static_assert(sizeof(struct vring_used_elem) == 8, "2.7.8");
_Static_assert(offsetof(struct vring_avail, ring) == 4, "2.7.6");
_Static_assert(offsetof(struct vring_used, ring) == 4, "2.7.8");
_Static_assert(sizeof(struct vring_packed_desc_event) == 4, "2.8.14");

/* Alignment of the three areas of a ring (2.7 and 2.8, table of alignments). */
#define VRING_DESC_ALIGN 16u
#define VRING_SPLIT_AVAIL_ALIGN 2u
#define VRING_SPLIT_USED_ALIGN 4u
#define VRING_PACKED_EVENT_ALIGN 4u

/* Bytes of each area. The split ones count the event index, which is always laid out. */
static inline size_t vring_desc_size(uint32_t num)
{
	return (size_t)num * 16;
}

static inline size_t vring_driver_size(uint32_t num, int packed)
{
	return packed ? sizeof(struct vring_packed_desc_event) : 6 + (size_t)num * 2;
}

static inline size_t vring_device_size(uint32_t num, int packed)
{
	return packed ? sizeof(struct vring_packed_desc_event) : 6 + (size_t)num * 8;
}

/*
 * 2.7.7.1: has the other side asked to be told about an index in (old, new]? All in 16 bits,
 * with wrap.
 */
static inline int vring_need_event(uint16_t event, uint16_t new_idx, uint16_t old)
{
	return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old);
}

#endif
