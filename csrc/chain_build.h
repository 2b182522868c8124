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

/* Both formats have address and length in the first 12 bytes; the last 4 are the format's own. */
struct raw_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t third;	 /* split: flags; packed: id */
	uint16_t fourth; /* split: next; packed: flags */
};

typedef uint64_t __attribute__((may_alias)) aliased_u64;

/* One read of each half; what the other side writes afterwards is not seen. */
static inline struct raw_desc fetch_desc(const void *desc)
{
	const aliased_u64 *p = desc;
	union {
		uint64_t half[2];
		struct raw_desc raw;
	} u = { { READ_ONCE(p[0]), READ_ONCE(p[1]) } };

	return u.raw;
}

/* The same from an indirect table, which may be unaligned and cross regions. */
static inline bool fetch_table_desc(struct guest_memory *mem, uint64_t addr, struct raw_desc *raw)
{
	uint64_t half[2], len = sizeof(half);
	const uint8_t *p = guest_memory_at(mem, addr, &len);

	if (unlikely(!p))
		return false;
	if (likely(len == sizeof(half)))
		memcpy(half, p, sizeof(half));
	else if (guest_memory_read(mem, addr, half, sizeof(half)) != sizeof(half))
		return false;
	/* From here on the values live in registers: the compiler must not load them again. */
	__asm__ __volatile__("" : "+r"(half[0]), "+r"(half[1]));
	memcpy(raw, half, sizeof(half));
	return true;
}

bool chain_grow(struct vhost_chain *c, uint32_t used);

static inline int vq_fault(struct virtqueue *vq, enum virtqueue_fault fault, uint16_t head,
			   uint64_t value, uint64_t limit)
{
	vq->report = (struct virtqueue_fault_report){ fault, head, value, limit };
	return -1;
}

static inline void chain_reset(struct vhost_chain *c)
{
	c->out_num = c->in_num = 0;
	c->out_len = c->in_len = 0;
	c->ndesc = 0;
	c->iov = c->fixed;
}

/* Append one buffer. 0, or -1 with the fault reported. */
static inline int chain_add(struct virtqueue *vq, struct vhost_chain *c, uint16_t head,
			    uint64_t addr, uint32_t len, bool write)
{
	uint32_t n = c->out_num + c->in_num;
	uint64_t total = (uint64_t)c->out_len + c->in_len + len;
	uint64_t left = len;

	if (unlikely(!len))
		return vq_fault(vq, VQ_LENGTH_ZERO, head, addr, 0);
	if (unlikely(!write && c->in_num))
		return vq_fault(vq, VQ_WRITE_BEFORE_READ, head, addr, 0);
	if (unlikely(total > UINT32_MAX))
		return vq_fault(vq, VQ_LENGTH_TOTAL, head, total, (uint64_t)UINT32_MAX + 1);
	for (;;) {
		uint32_t cap = c->iov == c->fixed ? VHOST_CHAIN_INLINE : c->spill_cap;
		uint64_t piece = left;
		uint8_t *p = guest_memory_at(vq->mem, addr, &piece);

		if (unlikely(!p))
			return vq_fault(vq, VQ_ADDRESS, head, addr, 0);
		if (unlikely(n == cap && !chain_grow(c, n)))
			return vq_fault(vq, VQ_TOO_MANY_PIECES, head, n, VHOST_CHAIN_MAX_PIECES);
		c->iov[n].iov_base = p;
		c->iov[n].iov_len = piece;
		n++;
		left -= piece;
		if (likely(!left))
			break;
		addr += piece;
		if (unlikely(!addr)) /* the buffer goes on past the last address there is */
			return vq_fault(vq, VQ_ADDRESS, head, addr, 0);
	}
	if (write) {
		c->in_num = n - c->out_num;
		c->in_len += len;
	} else {
		c->out_num = n;
		c->out_len += len;
	}
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

/* The chain is whole: it is out from here on. */
static inline int chain_out(struct virtqueue *vq, struct vhost_chain *c)
{
	struct vq_slot *slot = &vq->slots[c->id];

	if (unlikely(c->ndesc > vq->num - vq->inuse))
		return vq_fault(vq, VQ_CHAIN_TOO_LONG, c->id, c->ndesc, vq->num - vq->inuse + 1);
	slot->in_len = c->in_len;
	slot->ndesc = c->ndesc;
	slot->seq = vq->pops++;
	slot->done = false;
	vq->inuse += c->ndesc;
	if (vq->in_order) {
		uint32_t end = vq->order_head + vq->order_count++;

		vq->order[end < vq->num ? end : end - vq->num] = c->id;
	}
	return 1;
}

#endif
