/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Frames to be segmented, of which anything may be wrong: what is cut lies in the frame, and nothing of it is lost or
 * comes twice. What the segments have in their headers is compared in Python (test_net_segments.py).
 */
#include <stdlib.h>

#include "check.h"
#include "net_segment.h"

#ifdef __SANITIZE_ADDRESS__
#define ROUNDS 30000u
#else
#define ROUNDS 200000u
#endif

static uint64_t state = 88172645463325252ull;

static uint32_t rnd(uint32_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 33) % below;
}

/* A packet that is right, but for a few bytes of it and of its header. */
static void make(uint8_t *frame, uint32_t len, struct net_header *h)
{
	static const uint8_t types[] = { NET_GSO_TCPV4, NET_GSO_TCPV6, NET_GSO_UDP_L4, NET_GSO_UDP };
	bool v6 = rnd(2);
	uint32_t l4 = NET_ETH_HDR + (v6 ? 40 : 20);

	for (uint32_t i = 0; i < len; i++)
		frame[i] = (uint8_t)rnd(256);
	*h = (struct net_header){ 1, types[rnd(4)], 54, (uint16_t)(1 + rnd(2000)), (uint16_t)l4, 16, 0 };
	if (len > l4 + 12) {
		frame[12] = v6 ? 0x86 : 0x08;
		frame[13] = v6 ? 0xdd : 0x00;
		frame[14] = v6 ? 0x60 : 0x45;
		frame[l4 + 12] = (uint8_t)(rnd(16) << 4);
	}
	if (!rnd(4))
		frame[rnd(len)] = (uint8_t)rnd(256);
	if (!rnd(4))
		h->csum_start = (uint16_t)rnd(rnd(2) ? 0x10000 : len + 20);
	if (!rnd(8))
		((uint8_t *)h)[rnd(sizeof(*h))] = (uint8_t)rnd(256);
}

static void test_anything(void)
{
	uint64_t cut = 0;

	for (uint32_t round = 0; round < ROUNDS; round++) {
		uint32_t len = NET_ETH_HDR + rnd(rnd(8) ? 3000 : 66000), total = 0;
		uint8_t *frame = malloc(len), *hdr = malloc(NET_SEGMENT_HDR); /* so that ASan knows their ends */
		struct net_header h;
		struct net_segments s;
		struct net_frame f;
		struct iovec iov[2];

		make(frame, len, &h);
		if (!net_segments_begin(&s, &h, frame, len)) {
			cut++;
			while (net_segments_next(&s, hdr, &f, iov)) {
				CHECK(iov[0].iov_base == hdr && iov[0].iov_len == s.hdr);
				CHECK(iov[1].iov_base == frame + s.hdr + total);
				CHECK(iov[1].iov_len && iov[1].iov_len <= h.gso_size);
				CHECK_EQ(f.len, s.hdr + iov[1].iov_len);
				CHECK(!f.header.flags && !f.header.gso_type);
				total += (uint32_t)iov[1].iov_len;
			}
			CHECK_EQ(total, len - s.hdr);
		}
		free(frame);
		free(hdr);
	}
	CHECK(cut > ROUNDS / 20);
}

int main(void)
{
	RUN(test_anything);
	return 0;
}
