/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * How device_split.c and device_packed.c turn descriptors into a chain: fetch each once, check,
 * translate. Inline, for this is what a device spends its time on.
 */
#ifndef VHOST_CHAIN_BUILD_H
#define VHOST_CHAIN_BUILD_H

#include <string.h>

#include "chain.h"
#include "virtqueue.h"

/* Longest indirect table whose descriptors are followed. A chain has at most as many as the queue
 * (2.7.5.3.1, 2.8.19), but drivers with small queues are known to go beyond; QEMU lets them, up to
 * this. */
#define CHAIN_TABLE_MAX 1024u

/* A descriptor as it was fetched, in the two halves that it was read in: taken apart where it is needed, for
 * the compiler would put a struct of its fields together again and again. */
struct raw_desc {
	uint64_t addr;
	uint64_t rest; /* length; then split: flags, next; packed: id, flags */
};

static inline uint32_t raw_len(struct raw_desc d)
{
	return (uint32_t)d.rest;
}

static inline uint16_t raw_third(struct raw_desc d)
{
	return (uint16_t)(d.rest >> 32);
}

static inline uint16_t raw_fourth(struct raw_desc d)
{
	return (uint16_t)(d.rest >> 48);
}

/* The tables of rings are aligned; indirect ones need not be. */
typedef uint64_t __attribute__((may_alias, aligned(1))) aliased_u64;

/* One read of each half; what the other side writes afterwards is not seen. */
static inline struct raw_desc fetch_desc(const void *desc)
{
	const aliased_u64 *p = desc;

	return (struct raw_desc){ READ_ONCE(p[0]), READ_ONCE(p[1]) };
}

/* An indirect table: it may be unaligned and cross regions. */
struct desc_table {
	uint64_t addr;
	const uint8_t *host; /* NULL: not in one piece */
};

static inline struct desc_table desc_table(struct guest_memory *mem, uint64_t addr, uint64_t len)
{
	uint64_t got = len;
	const uint8_t *p = guest_memory_at(mem, addr, &got);

	return (struct desc_table){ addr, likely(got == len) ? p : NULL };
}

/* Copies from where a table lies; what is not in the ring's own table of memory may be in its IOTLB. False:
 * not all of it is there. */
bool chain_read(struct virtqueue *vq, uint64_t addr, void *to, uint64_t len);

static inline bool fetch_table_desc(struct virtqueue *vq, const struct desc_table *t, uint32_t i,
				    struct raw_desc *raw)
{
	uint64_t at = (uint64_t)i * sizeof(*raw);

	if (likely(t->host)) {
		*raw = fetch_desc(t->host + at);
		return true;
	}
	return t->addr + at >= t->addr && chain_read(vq, t->addr + at, raw, sizeof(*raw));
}

/* A function, so that what a fault takes stays out of the way of what is none. */
void vq_report(struct virtqueue *vq, enum virtqueue_fault fault, uint16_t head, uint64_t value,
	       uint64_t limit) __attribute__((cold));

static inline int vq_fault(struct virtqueue *vq, enum virtqueue_fault fault, uint16_t head,
			   uint64_t value, uint64_t limit)
{
	vq_report(vq, fault, head, value, limit);
	return -1;
}

/* Not all of these bytes can be accessed in this way (kind 0: read; VRING_DESC_F_WRITE: written). That is a
 * fault; or, behind an IOMMU, a miss. -1. */
int chain_no_access(struct virtqueue *vq, uint16_t head, uint64_t addr, uint64_t len, uint32_t kind)
	__attribute__((cold));

/*
 * A chain while it is walked. It lives in registers, and so nothing that is not inlined may have its
 * address: what is rare goes through the chain itself. c->out_num and c->out_len are of the readable
 * buffers so far, which all come first: beyond them, the walk is at the writable ones.
 */
struct chain_walk {
	struct iovec *iov;		/* c->iov */
	const struct guest_region *region; /* of the last buffer: the next one's, too, most of the time */
	uint64_t len; /* of the whole chain; no overflow: descriptors are fewer than 2^32 */
	uint32_t n, cap; /* pieces, and how many c->iov has room for */
};

static inline __attribute__((always_inline)) struct chain_walk
chain_begin(const struct virtqueue *vq, struct vhost_chain *c)
{
	c->iov = c->fixed;
	return (struct chain_walk){
		.iov = c->fixed,
		.region = vq->mem->by_guest,
		.cap = VHOST_CHAIN_INLINE,
	};
}

/* For a walk that goes on in another function. */
static inline struct chain_walk chain_resume(const struct virtqueue *vq, struct vhost_chain *c,
					     uint32_t n, uint64_t len)
{
	uint32_t cap = c->iov == c->fixed ? VHOST_CHAIN_INLINE : c->spill_cap;

	return (struct chain_walk){ c->iov, vq->mem->by_guest, len, n, cap };
}

/* What has been walked is readable. */
static inline void chain_readable(struct vhost_chain *c, const struct chain_walk *w)
{
	c->out_num = w->n;
	c->out_len = (uint32_t)w->len;
}

/*
 * Appends a buffer that is as most are: whole in the region of the last one, or in the one that the hint
 * says, with room in c->iov. False: chain_add has to look at it, which knows all that is rare, and faults.
 */
static inline __attribute__((always_inline)) bool chain_place(const struct guest_memory *mem,
							      struct chain_walk *w, struct raw_desc d)
{
	const struct guest_region *r = w->region;
	uint64_t off = d.addr - r->guest_addr, len = raw_len(d), room;

	if (__builtin_sub_overflow(r->size, off, &room)) {
		w->region = r = guest_memory_guess(mem, d.addr);
		off = d.addr - r->guest_addr;
		if (unlikely(__builtin_sub_overflow(r->size, off, &room)))
			return false;
	}
	/* One comparison for "not empty" and "not beyond the end": 0 - 1 is beyond any. */
	if (unlikely(len - 1 >= room || w->n == w->cap))
		return false;
	w->iov[w->n].iov_base = r->host + off;
	w->iov[w->n].iov_len = len;
	w->n++;
	w->len += len;
	return true;
}

/* Appends a buffer in as many pieces as it takes. How many pieces there are now, or -1 with the fault
 * reported. */
int chain_add_pieces(struct virtqueue *vq, struct vhost_chain *c, uint32_t n, uint16_t head,
		     uint64_t addr, uint32_t len, uint32_t kind);

/* Appends any buffer. 0, or -1 with the fault reported. */
static inline int chain_add(struct virtqueue *vq, struct vhost_chain *c, struct chain_walk *w,
			    uint16_t head, struct raw_desc d, uint16_t flags)
{
	uint32_t kind = flags & VRING_DESC_F_WRITE;

	if (unlikely(!kind && w->n > c->out_num && !vq->read_only))
		return vq_fault(vq, VQ_WRITE_BEFORE_READ, head, d.addr, 0);
	if (unlikely(!chain_place(vq->mem, w, d))) {
		int n = chain_add_pieces(vq, c, w->n, head, d.addr, raw_len(d), kind);

		if (n < 0)
			return -1;
		*w = chain_resume(vq, c, (uint32_t)n, w->len + raw_len(d));
	}
	if (!kind)
		chain_readable(c, w);
	return 0;
}

/* Is an indirect descriptor acceptable? *entries: descriptors in its table. */
static inline int chain_check_indirect(struct virtqueue *vq, uint16_t head, uint32_t len,
				       uint16_t flags, uint32_t *entries)
{
	if (unlikely(!vq->indirect))
		return vq_fault(vq, VQ_INDIRECT_DISABLED, head, flags, 0);
	if (unlikely(flags & VRING_DESC_F_NEXT))
		return vq_fault(vq, VQ_INDIRECT_NEXT, head, flags, 0);
	if (unlikely(!len || len % sizeof(struct vring_desc)))
		return vq_fault(vq, VQ_INDIRECT_LENGTH, head, len, 0);
	*entries = len / sizeof(struct vring_desc);
	return 0;
}

static inline uint32_t chain_table_limit(const struct virtqueue *vq)
{
	return vq->num > CHAIN_TABLE_MAX ? vq->num : CHAIN_TABLE_MAX;
}

/* A chain has this many pieces at most: as many buffers as it may have, and as many borders of regions
 * that they cross. Not more, for a device may hold as many chains as the ring has slots. */
static inline uint32_t chain_max_pieces(const struct virtqueue *vq)
{
	return 2 * chain_table_limit(vq);
}

/* The chain is whole: it is out from here on. */
static inline __attribute__((always_inline)) int chain_out(struct virtqueue *vq, struct vhost_chain *c,
							   const struct chain_walk *w, uint16_t id,
							   uint32_t ndesc)
{
	struct vq_slot *slot = &vq->slots[id];

	/* `len` is that of the whole chain, out_len the readable part of it. */
	if (unlikely(w->len > UINT32_MAX))
		return vq_fault(vq, VQ_LENGTH_TOTAL, id, w->len, (uint64_t)UINT32_MAX + 1);
	if (unlikely(ndesc > vq->num - vq->inuse))
		return vq_fault(vq, VQ_CHAIN_TOO_LONG, id, ndesc, vq->num - vq->inuse + 1);
	c->id = id;
	c->ndesc = (uint16_t)ndesc;
	c->in_num = w->n - c->out_num;
	c->in_len = (uint32_t)w->len - c->out_len;
	slot->len = c->in_len;
	slot->seq = vq->pops++ & VQ_SEQ_MASK;
	slot->ndesc = (uint16_t)ndesc;
	vq->inuse += ndesc;
	if (unlikely(vq->in_order)) {
		uint32_t end = vq->order_head + vq->order_count++;

		vq->order[end < vq->num ? end : end - vq->num] = id;
	}
	return 1;
}

#endif
