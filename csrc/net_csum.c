/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Words are added in the order of memory: the sum of swapped words is the swapped sum (RFC 1071, 2). */
#include <string.h>

#include "net_csum.h"

uint64_t net_csum_add(uint64_t sum, const void *data, uint32_t len)
{
	const uint8_t *p = data;
	uint32_t word;
	uint16_t half;

	/* 2^32 words of 32 bits fit into the sum. */
	for (; len >= 4; len -= 4, p += 4) {
		memcpy(&word, p, 4);
		sum += word;
	}
	if (len >= 2) {
		memcpy(&half, p, 2);
		sum += half;
		len -= 2;
		p += 2;
	}
	if (len)
		sum += *p; /* as if a zero followed; little-endian, as vring.h asserts */
	return sum;
}

uint16_t net_csum_fold(uint64_t sum)
{
	uint16_t folded;

	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	folded = (uint16_t)~sum;
	return folded ? folded : 0xffff;
}

void net_finish_csum(uint8_t *frame, uint32_t len, const struct net_header *header)
{
	uint16_t csum = net_csum_fold(net_csum_add(0, frame + header->csum_start, len - header->csum_start));

	memcpy(frame + header->csum_start + header->csum_offset, &csum, sizeof(csum));
}
