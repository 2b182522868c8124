/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A frame that a network driver sent: from a chain, in whatever layout (VIRTIO 1.2, 2.7.4), to a header of
 * our own that was checked, and the pieces of guest memory that the frame lies in (5.1.6.2). Knows chains;
 * knows neither rings nor where a frame goes.
 */
#ifndef VHOST_NET_FRAME_H
#define VHOST_NET_FRAME_H

#include <stdbool.h>
#include <string.h>
#include <sys/uio.h>

#include "barrier.h"
#include "chain.h"
#include "net_counters.h"
#include "virtio_net.h"

/* Work that one side may leave to the other, as was negotiated. */
struct net_offloads {
	bool csum;
	uint8_t gso; /* one bit for each type, by its number; ECN's own, which is the highest */
};

static inline bool net_offloads_gso(const struct net_offloads *o, uint8_t gso_type)
{
	uint8_t type = gso_type & ~NET_GSO_ECN;

	return type < 7 && o->gso >> type & 1 && (!(gso_type & NET_GSO_ECN) || o->gso & NET_GSO_ECN);
}

struct net_frame {
	struct net_header header; /* num_buffers means nothing */
	uint32_t len, num;
	struct iovec *iov; /* num pieces, none of them empty; the chain's, or somebody else's */
};

/* Is there anything in the header at all? Most have only zeroes there. */
static inline bool net_frame_is_plain(const struct net_frame *f)
{
	return !(f->header.flags | f->header.gso_type);
}

/* What the driver may send. */
struct net_frame_rules {
	struct net_offloads offloads;
	uint32_t hdr_len;
	uint32_t longest; /* of a frame that is not to be segmented, Ethernet header and tag included */
};

/* The rest of net_frame_take: what fewer frames have. */
enum net_drop net_frame_take_any(struct net_frame *f, struct vhost_chain *c, const struct net_frame_rules *r)
	__attribute__((cold));
enum net_drop net_frame_check_offloads(struct net_frame *f, const struct net_frame_rules *r);

/* The header, but for num_buffers, which a driver sends as 0: read once, and what the compiler has in
 * registers stays there. */
static inline void net_frame_read_header(struct net_header *h, const void *from)
{
	uint64_t half;
	uint16_t rest;

	memcpy(&half, from, sizeof(half));
	memcpy(&rest, (const uint8_t *)from + sizeof(half), sizeof(rest));
	__asm__ __volatile__("" : "+r"(half), "+r"(rest));
	memcpy(h, &half, sizeof(half));
	memcpy((uint8_t *)h + sizeof(half), &rest, sizeof(rest));
	h->num_buffers = 0;
}

/*
 * What the chain has to send: all of it, for nobody receives with this queue, and what its driver marks as
 * writable is a slip (DPDK's virtio_user has two). Its iovecs are used up: the frame has them from here on. Anything but
 * NET_PASSES: why it is none, and what is in *f then means nothing.
 */
static inline enum net_drop net_frame_take(struct net_frame *f, struct vhost_chain *c,
					   const struct net_frame_rules *r)
{
	uint32_t skip = r->hdr_len;
	struct iovec *iov = c->iov;

	/* The header in front of the frame or in a descriptor of its own, and nothing to write to. */
	if (unlikely(c->in_num || c->out_len < skip + NET_ETH_HDR || iov->iov_len < skip))
		return net_frame_take_any(f, c, r);
	net_frame_read_header(&f->header, iov->iov_base);
	f->len = c->out_len - skip;
	f->num = c->out_num;
	if (iov->iov_len == skip) {
		iov++;
		f->num--;
	} else {
		iov->iov_base = (uint8_t *)iov->iov_base + skip;
		iov->iov_len -= skip;
	}
	f->iov = iov;
	if (unlikely(!net_frame_is_plain(f)))
		return net_frame_check_offloads(f, r);
	return likely(f->len <= r->longest) ? NET_PASSES : NET_DROP_LONG;
}

/* Copies a frame, all of it. */
void net_frame_copy(const struct net_frame *f, uint8_t *to);

#endif
