/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Headers in several descriptors, and headers that say something. */
#include "net_frame.h"

const char *const net_drop_names[NET_DROPS] = {
	[NET_DROP_SHORT] = "short",
	[NET_DROP_LONG] = "long",
	[NET_DROP_CSUM] = "csum",
	[NET_DROP_GSO] = "gso",
	[NET_DROP_WIRE] = "wire",
	[NET_DROP_DISABLED] = "disabled",
	[NET_DROP_STOPPED] = "stopped",
	[NET_DROP_MTU] = "mtu",
	[NET_DROP_NO_BUFFER] = "no_buffer",
	[NET_DROP_NO_ROOM] = "no_room",
	[NET_DROP_BUFFER] = "bad_buffer",
};

enum net_drop net_frame_take_any(struct net_frame *f, struct vhost_chain *c, const struct net_frame_rules *r)
{
	uint8_t raw[NET_HDR_MAX];
	struct iovec *iov = c->iov;
	uint32_t num = c->out_num + c->in_num, len = c->out_len + c->in_len, got = 0;

	if (len < r->hdr_len + NET_ETH_HDR)
		return NET_DROP_SHORT;
	while (got < r->hdr_len) {
		size_t n = iov->iov_len < r->hdr_len - got ? iov->iov_len : r->hdr_len - got;

		memcpy(raw + got, iov->iov_base, n);
		got += n;
		iov->iov_base = (uint8_t *)iov->iov_base + n;
		iov->iov_len -= n;
		if (!iov->iov_len) {
			iov++;
			num--;
		}
	}
	net_frame_read_header(&f->header, raw);
	f->len = len - r->hdr_len;
	f->num = num;
	f->iov = iov;
	if (!net_frame_is_plain(f))
		return net_frame_check_offloads(f, r);
	return f->len <= r->longest ? NET_PASSES : NET_DROP_LONG;
}

/* 5.1.6.2.2: what flags a device does not know, and those that are for the other direction, it ignores; hdr_len
 * is a hint, which it must not rely on. */
enum net_drop net_frame_check_offloads(struct net_frame *f, const struct net_frame_rules *r)
{
	struct net_header *h = &f->header;
	bool csum = h->flags &= NET_HDR_F_NEEDS_CSUM;

	if (csum && (!r->offloads.csum || (uint32_t)h->csum_start + h->csum_offset + 2 > f->len))
		return NET_DROP_CSUM;
	if (h->hdr_len > f->len)
		h->hdr_len = (uint16_t)f->len;
	if (h->gso_type == NET_GSO_NONE)
		return f->len <= r->longest ? NET_PASSES : NET_DROP_LONG;
	if (!net_offloads_gso(&r->offloads, h->gso_type) || !csum || !h->gso_size)
		return NET_DROP_GSO;
	return f->len <= NET_FRAME_MAX ? NET_PASSES : NET_DROP_LONG;
}

void net_frame_copy(const struct net_frame *f, uint8_t *to)
{
	for (uint32_t i = 0; i < f->num; i++) {
		memcpy(to, f->iov[i].iov_base, f->iov[i].iov_len);
		to += f->iov[i].iov_len;
	}
}
