/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A device queue and, played by hand, the driver at the other end of it: written from the text of
 * VIRTIO 1.2 and not from the driver code, so that the device is not tested against the other half of
 * the same mind. Every area and region is memory of its own, as long as it is said to be. One thread.
 */
#ifndef VHOST_TEST_DEVICE_RIG_H
#define VHOST_TEST_DEVICE_RIG_H

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "iotlb.h"
#include "virtqueue.h"

#define MAX_NUM 64u
#define REGIONS 3u
#define REGION_SIZE 0x1000u
/* The first two touch each other in guest addresses, the third is apart. */
static const uint64_t region_addr[REGIONS] = { 0x10000, 0x11000, 0x80000 };

#define N VRING_DESC_F_NEXT
#define W VRING_DESC_F_WRITE
#define I VRING_DESC_F_INDIRECT

struct options {
	bool packed, indirect, event_idx, in_order;
	bool swapped; /* split: the driver has the other byte order */
	bool iommu;   /* addresses are IOVAs, of which none is mapped at first */
	uint32_t num;
	uint16_t start; /* split: index to start at; packed: position, in a lap of wrap counter 1 */
};

/* A number of the ring as the driver has it. */
#define ORD16(r, x) ((uint16_t)((r)->o.swapped ? __builtin_bswap16(x) : (x)))
#define ORD32(r, x) ((uint32_t)((r)->o.swapped ? __builtin_bswap32(x) : (x)))
#define ORD64(r, x) ((uint64_t)((r)->o.swapped ? __builtin_bswap64(x) : (x)))

struct rig {
	struct options o;
	struct guest_memory mem;
	struct iotlb tlb;
	uint8_t *host[REGIONS];
	struct virtqueue vq;
	struct vhost_chain chain;
	struct vring_desc *desc; /* the same memory as pdesc */
	struct vring_packed_desc *pdesc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct vring_packed_desc_event *driver, *device;
	/* The driver's own state. */
	uint16_t next_avail, next_used;
	bool avail_wrap, used_wrap;
	uint32_t free;
	uint16_t slots[MAX_NUM]; /* per id: descriptors of the chain, 0 if it is not out */
	bool busy[MAX_NUM];	 /* split: descriptors that some chain has */
	uint16_t next[MAX_NUM];	 /* split: as it was written to the table */
};

static inline struct virtqueue_config rig_config(struct rig *r, uint32_t base)
{
	return (struct virtqueue_config){
		.areas = { r->desc, r->avail, r->used },
		.mem = r->o.iommu ? &r->tlb.view : &r->mem,
		.iotlb = r->o.iommu ? &r->tlb : NULL,
		.num = r->o.num,
		.base = base,
		.packed = r->o.packed,
		.indirect = r->o.indirect,
		.event_idx = r->o.event_idx,
		.in_order = r->o.in_order,
		.swapped = r->o.swapped,
	};
}

static inline void rig_init(struct rig *r, struct options o)
{
	struct guest_region regions[REGIONS];
	struct virtqueue_config cfg;
	uint32_t bad;

	memset(r, 0, sizeof(*r));
	r->o = o;
	CHECK(o.num <= MAX_NUM);
	for (unsigned i = 0; i < REGIONS; i++) {
		r->host[i] = calloc(1, REGION_SIZE);
		regions[i] = (struct guest_region){ region_addr[i], region_addr[i] + (1 << 20),
						    REGION_SIZE, r->host[i] };
	}
	CHECK_EQ(guest_memory_init(&r->mem, regions, REGIONS, &bad), 0);
	if (o.iommu)
		CHECK_EQ(iotlb_init(&r->tlb, &r->mem), 0);
	r->desc = calloc(o.num, sizeof(*r->desc));
	r->pdesc = (void *)r->desc;
	r->avail = calloc(1, vring_driver_size(o.num, o.packed));
	r->used = calloc(1, vring_device_size(o.num, o.packed));
	r->driver = (void *)r->avail;
	r->device = (void *)r->used;
	r->free = o.num;
	r->next_avail = r->next_used = o.start;
	r->avail_wrap = r->used_wrap = true;
	if (o.packed)
		/* The slots before it were used in this lap. */
		for (unsigned i = 0; i < o.start; i++)
			r->pdesc[i].flags = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;
	else
		r->avail->idx = r->used->idx = ORD16(r, o.start);
	cfg = rig_config(r, o.packed ? (o.start | 0x8000u) * 0x10001u : o.start);
	CHECK_EQ(virtqueue_init(&r->vq, &cfg), 0);
	vhost_chain_init(&r->chain);
}

static inline void rig_destroy(struct rig *r)
{
	vhost_chain_destroy(&r->chain);
	virtqueue_destroy(&r->vq);
	iotlb_destroy(&r->tlb);
	guest_memory_destroy(&r->mem);
	for (unsigned i = 0; i < REGIONS; i++)
		free(r->host[i]);
	free(r->desc);
	free(r->avail);
	free(r->used);
}

/* ---------------------------------------------------------- the driver, by hand */

struct piece {
	uint64_t addr;
	uint32_t len;
	uint16_t flags; /* W or I */
};

static inline void step(const struct rig *r, uint16_t *at, bool *wrap, unsigned slots)
{
	*at += slots;
	if (r->o.packed && *at >= r->o.num) {
		*at -= r->o.num;
		*wrap = !*wrap;
	}
}

/* The flags of the head come last (2.8.21.1): the chain is made available by its return. */
static inline void packed_add(struct rig *r, uint16_t id, const struct piece *p, unsigned n)
{
	uint16_t head = r->next_avail, head_flags = 0;

	for (unsigned i = 0; i < n; i++) {
		uint16_t flags = p[i].flags | (i + 1 < n ? N : 0);

		flags |= r->avail_wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED;
		r->pdesc[r->next_avail].addr = p[i].addr;
		r->pdesc[r->next_avail].len = p[i].len;
		/* Means something in the last one only (2.8.6). */
		r->pdesc[r->next_avail].id = i + 1 < n ? 0xdead : id;
		if (i)
			r->pdesc[r->next_avail].flags = flags;
		else
			head_flags = flags;
		step(r, &r->next_avail, &r->avail_wrap, 1);
	}
	r->pdesc[head].flags = head_flags;
}

static inline uint16_t split_add(struct rig *r, const struct piece *p, unsigned n)
{
	uint16_t at[MAX_NUM], d = r->o.num;

	/* From the end, so that chains do not lie in the order of the table. */
	for (unsigned i = 0; i < n; i++) {
		while (r->busy[--d])
			;
		at[i] = d;
		r->busy[d] = true;
	}
	for (unsigned i = 0; i < n; i++) {
		uint16_t next = i + 1 < n ? at[i + 1] : 0xdead;

		r->next[at[i]] = next;
		r->desc[at[i]] = (struct vring_desc){
			ORD64(r, p[i].addr), ORD32(r, p[i].len),
			ORD16(r, p[i].flags | (i + 1 < n ? N : 0)), ORD16(r, next)
		};
	}
	r->avail->ring[r->next_avail % r->o.num] = ORD16(r, at[0]);
	r->next_avail++;
	r->avail->idx = ORD16(r, r->next_avail);
	return at[0];
}

/* The id, or -1 if it does not fit. */
static inline int rig_add(struct rig *r, const struct piece *p, unsigned n)
{
	uint16_t id;

	if (n > r->free)
		return -1;
	r->free -= n;
	if (r->o.packed) {
		for (id = 0; r->slots[id]; id++)
			;
		packed_add(r, id, p, n);
	} else {
		id = split_add(r, p, n);
	}
	r->slots[id] = n;
	return id;
}

/* One used element, if the driver can see one. */
static inline bool rig_used(struct rig *r, uint16_t *id, uint32_t *len)
{
	if (r->o.packed) {
		uint16_t flags = r->pdesc[r->next_used].flags;

		if (!!(flags & VRING_PACKED_DESC_F_AVAIL) != r->used_wrap ||
		    !!(flags & VRING_PACKED_DESC_F_USED) != r->used_wrap || r->free == r->o.num)
			return false;
		*id = r->pdesc[r->next_used].id;
		/* The length is reserved where nothing was written (2.8.4). */
		*len = flags & W ? r->pdesc[r->next_used].len : 0;
	} else {
		if (ORD16(r, r->used->idx) == r->next_used)
			return false;
		*id = ORD32(r, r->used->ring[r->next_used % r->o.num].id);
		*len = ORD32(r, r->used->ring[r->next_used % r->o.num].len);
	}
	CHECK(*id < r->o.num && r->slots[*id]);
	step(r, &r->next_used, &r->used_wrap, r->o.packed ? r->slots[*id] : 1);
	r->free += r->slots[*id];
	if (!r->o.packed)
		for (uint16_t d = *id, n = r->slots[*id]; n--; d = r->next[d])
			r->busy[d] = false;
	r->slots[*id] = 0;
	return true;
}

static inline void expect_used(struct rig *r, int id, uint32_t len)
{
	uint16_t have_id;
	uint32_t have_len;

	CHECK(rig_used(r, &have_id, &have_len));
	CHECK_EQ(have_id, id);
	CHECK_EQ(have_len, len);
}

static inline void expect_no_used(struct rig *r)
{
	uint16_t id;
	uint32_t len;

	CHECK(!rig_used(r, &id, &len));
}

/* ---------------------------------------------------------- chance */

static uint64_t seed = 88172645463325252ull;

static inline uint32_t rnd(uint32_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)((seed >> 11) % below);
}

#endif
