/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The life of a chain's iovecs, and what is rare in filling them: the rest is in chain_build.h. */
#include "chain.h"

#include <stdlib.h>
#include <string.h>

#include "chain_build.h"
#include "iotlb.h"

void vhost_chain_init(struct vhost_chain *c)
{
	memset(c, 0, sizeof(*c));
	c->iov = c->fixed;
}

void vhost_chain_destroy(struct vhost_chain *c)
{
	free(c->spill);
	vhost_chain_init(c);
}

/* Room for one more piece behind the first n, which are fewer than max. */
static bool grow(struct vhost_chain *c, uint32_t n, uint32_t max)
{
	uint32_t cap = c->spill_cap ? c->spill_cap * 2 : VHOST_CHAIN_INLINE * 8;
	struct iovec *spill;

	if (c->iov == c->spill || !c->spill) {
		if (cap > max)
			cap = max;
		spill = realloc(c->spill, cap * sizeof(*spill));
		if (!spill)
			return false;
		c->spill = spill;
		c->spill_cap = cap;
	}
	if (c->iov == c->fixed)
		memcpy(c->spill, c->fixed, n * sizeof(*c->fixed));
	c->iov = c->spill;
	return true;
}

static uint32_t access_of(uint32_t kind)
{
	return kind & VRING_DESC_F_WRITE ? IOTLB_WRITE : IOTLB_READ;
}

/* Without an IOMMU the ring's table of memory is all there is; with one it is what may be read and written. */
static uint8_t *translate(struct virtqueue *vq, uint64_t addr, uint32_t kind, uint64_t *len)
{
	uint8_t *p = guest_memory_at(vq->mem, addr, len);

	if (!p && vq->iotlb)
		p = iotlb_at(vq->iotlb, addr, access_of(kind), len);
	return p;
}

int chain_no_access(struct virtqueue *vq, uint16_t head, uint64_t addr, uint64_t len, uint32_t kind)
{
	struct iotlb_miss miss = { 0, 0 };

	if (vq->iotlb)
		miss = iotlb_missing(vq->iotlb, addr, len, access_of(kind));
	if (miss.access)
		return vq_fault(vq, VQ_MISS, head, miss.iova, miss.access);
	return vq_fault(vq, VQ_ADDRESS, head, addr, 0);
}

bool chain_read(struct virtqueue *vq, uint64_t addr, void *to, uint64_t len)
{
	if (vq->iotlb)
		return iotlb_read(vq->iotlb, addr, to, len) == len;
	return guest_memory_read(vq->mem, addr, to, len) == len;
}

int chain_add_pieces(struct virtqueue *vq, struct vhost_chain *c, uint32_t n, uint16_t head,
		     uint64_t addr, uint32_t len, uint32_t kind)
{
	uint32_t max = chain_max_pieces(vq);
	uint64_t left = len;

	if (!len)
		return vq_fault(vq, VQ_LENGTH_ZERO, head, addr, 0);
	for (;;) {
		uint32_t cap = c->iov == c->fixed ? VHOST_CHAIN_INLINE : c->spill_cap;
		uint64_t piece = left;
		uint8_t *p = translate(vq, addr, kind, &piece);

		if (!p)
			return chain_no_access(vq, head, addr, 1, kind);
		/* Without memory for them they are too many, too. */
		if (n >= max || (n == cap && !grow(c, n, max)))
			return vq_fault(vq, VQ_TOO_MANY_PIECES, head, n + 1, max + 1);
		c->iov[n].iov_base = p;
		c->iov[n].iov_len = piece;
		n++;
		left -= piece;
		if (!left)
			return (int)n;
		addr += piece;
		if (!addr) /* the buffer goes on past the last address there is */
			return vq_fault(vq, VQ_ADDRESS, head, addr, 0);
	}
}

void vq_report(struct virtqueue *vq, enum virtqueue_fault fault, uint16_t head, uint64_t value,
	       uint64_t limit)
{
	vq->report.head = head;
	vq->report.value = value;
	vq->report.limit = limit;
	/* Others look for it at any time. */
	STORE_RELEASE(vq->report.fault, fault);
}
