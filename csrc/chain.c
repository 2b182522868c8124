/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The life of a chain's iovecs, and what is rare in filling them: the rest is in chain_build.h. */
#include "chain.h"

#include <stdlib.h>
#include <string.h>

#include "chain_build.h"

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

int chain_add_pieces(struct virtqueue *vq, struct vhost_chain *c, uint32_t n, uint16_t head,
		     uint64_t addr, uint32_t len)
{
	uint32_t max = chain_max_pieces(vq);
	uint64_t left = len;

	if (!len)
		return vq_fault(vq, VQ_LENGTH_ZERO, head, addr, 0);
	for (;;) {
		uint32_t cap = c->iov == c->fixed ? VHOST_CHAIN_INLINE : c->spill_cap;
		uint64_t piece = left;
		uint8_t *p = guest_memory_at(vq->mem, addr, &piece);

		if (!p)
			return vq_fault(vq, VQ_ADDRESS, head, addr, 0);
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
	vq->report = (struct virtqueue_fault_report){ fault, head, value, limit };
}
