/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The life of a chain's iovecs; what fills them is in chain_build.h. */
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

bool chain_grow(struct vhost_chain *c, uint32_t used)
{
	uint32_t cap = c->spill_cap ? c->spill_cap * 2 : VHOST_CHAIN_INLINE * 8;
	struct iovec *spill;

	if (c->iov == c->spill || !c->spill) {
		if (cap > VHOST_CHAIN_MAX_PIECES)
			return false;
		spill = realloc(c->spill, cap * sizeof(*spill));
		if (!spill)
			return false;
		c->spill = spill;
		c->spill_cap = cap;
	}
	if (c->iov == c->fixed)
		memcpy(c->spill, c->fixed, used * sizeof(*c->fixed));
	c->iov = c->spill;
	return true;
}
