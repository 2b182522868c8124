/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#include "net_csum.h"
#include "net_segment.h"

#define ETH_TYPE 12u
#define TYPE_IPV4 0x0800
#define TYPE_IPV6 0x86dd
#define TYPE_VLAN 0x8100
#define TYPE_QINQ 0x88a8
#define IPV4_HDR 20u
#define IPV6_HDR 40u
#define TCP_HDR 20u
#define UDP_HDR 8u
#define PROTO_TCP 6
#define PROTO_UDP 17
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_CWR 0x80

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static void put16(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static void put32(uint8_t *p, uint32_t value)
{
	put16(p, value >> 16);
	put16(p + 2, value);
}

/* Where the header after Ethernet's begins, and which it is. */
static uint32_t skip_tags(const uint8_t *frame, uint32_t len, uint16_t *type)
{
	uint32_t at = NET_ETH_HDR;

	*type = get16(frame + ETH_TYPE);
	while ((*type == TYPE_VLAN || *type == TYPE_QINQ) && at + NET_VLAN_TAG <= len) {
		*type = get16(frame + at + 2);
		at += NET_VLAN_TAG;
	}
	return at;
}

enum net_drop net_segments_begin(struct net_segments *s, const struct net_header *header, const uint8_t *frame,
				 uint32_t len)
{
	uint8_t gso = header->gso_type & ~NET_GSO_ECN;
	const uint8_t *l4 = frame + header->csum_start;
	uint16_t type;

	*s = (struct net_segments){ .frame = frame, .len = len, .l4 = header->csum_start, .size = header->gso_size };
	s->tcp = gso == NET_GSO_TCPV4 || gso == NET_GSO_TCPV6;
	s->l3 = skip_tags(frame, len, &type);
	s->v6 = type == TYPE_IPV6;
	if ((type != TYPE_IPV4 && !s->v6) || (!s->tcp && gso != NET_GSO_UDP_L4) || s->size < NET_SEGMENT_MIN)
		return NET_DROP_GSO;
	if (s->tcp && s->v6 != (gso == NET_GSO_TCPV6))
		return NET_DROP_GSO;
	if (s->l4 < s->l3 + (s->v6 ? IPV6_HDR : IPV4_HDR) || s->l4 + (s->tcp ? TCP_HDR : UDP_HDR) > len)
		return NET_DROP_GSO;
	if (!s->v6 && s->l3 + (frame[s->l3] & 15) * 4u != s->l4)
		return NET_DROP_GSO;
	s->hdr = s->l4 + (s->tcp ? (l4[12] >> 4) * 4u : UDP_HDR);
	if (s->hdr < s->l4 + (s->tcp ? TCP_HDR : UDP_HDR) || s->hdr > NET_SEGMENT_HDR || s->hdr >= len)
		return NET_DROP_GSO;
	s->at = s->hdr;
	return NET_PASSES;
}

static void finish_ip(const struct net_segments *s, uint8_t *ip, uint32_t len)
{
	uint16_t csum;

	if (s->v6) {
		put16(ip + 4, len - IPV6_HDR);
		return;
	}
	put16(ip + 2, len);
	put16(ip + 4, get16(ip + 4) + s->index);
	put16(ip + 10, 0);
	csum = net_csum_fold(net_csum_add(0, ip, s->l4 - s->l3));
	memcpy(ip + 10, &csum, sizeof(csum));
}

static void finish_tcp(const struct net_segments *s, uint8_t *tcp, bool last)
{
	uint32_t seq = (uint32_t)get16(tcp + 4) << 16 | get16(tcp + 6);

	put32(tcp + 4, seq + (s->at - s->hdr));
	if (!last)
		tcp[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
	if (s->index)
		tcp[13] &= (uint8_t)~TCP_CWR;
}

/* Of the header at l4 and what follows, with what IP says of it (RFC 9293, 3.1; RFC 768; RFC 8200, 8.1). */
static void finish_csum(const struct net_segments *s, uint8_t *hdr, const uint8_t *data, uint32_t size)
{
	uint32_t l4_len = s->hdr - s->l4 + size, addresses = s->v6 ? 8 : 12, field = s->l4 + (s->tcp ? 16 : 6);
	uint8_t pseudo[8] = { 0 };
	uint64_t sum;
	uint16_t csum;

	put32(pseudo, l4_len);
	pseudo[7] = s->tcp ? PROTO_TCP : PROTO_UDP;
	put16(hdr + field, 0);
	sum = net_csum_add(0, pseudo, sizeof(pseudo));
	sum = net_csum_add(sum, hdr + s->l3 + addresses, s->v6 ? 32 : 8);
	sum = net_csum_add(sum, hdr + s->l4, s->hdr - s->l4); /* an even number */
	csum = net_csum_fold(net_csum_add(sum, data, size));
	memcpy(hdr + field, &csum, sizeof(csum));
}

bool net_segments_next(struct net_segments *s, uint8_t *hdr, struct net_frame *f, struct iovec iov[2])
{
	uint32_t left = s->len - s->at, size = left < s->size ? left : s->size;

	if (!left)
		return false;
	memcpy(hdr, s->frame, s->hdr);
	finish_ip(s, hdr + s->l3, s->hdr - s->l3 + size);
	if (s->tcp)
		finish_tcp(s, hdr + s->l4, size == left);
	else
		put16(hdr + s->l4 + 4, UDP_HDR + size);
	finish_csum(s, hdr, s->frame + s->at, size);
	iov[0] = (struct iovec){ hdr, s->hdr };
	iov[1] = (struct iovec){ (void *)(s->frame + s->at), size };
	*f = (struct net_frame){ .len = s->hdr + size, .num = 2, .iov = iov };
	s->at += size;
	s->index++;
	return true;
}
