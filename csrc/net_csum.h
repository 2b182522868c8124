/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The Internet checksum (RFC 1071), of frames in private memory. Knows bytes, and where a header says to begin. */
#ifndef VHOST_NET_CSUM_H
#define VHOST_NET_CSUM_H

#include <stdint.h>

#include "virtio_net.h"

/* Adds the bytes to a sum, as 16-bit words in memory order, which an odd one at the end is padded to. */
uint64_t net_csum_add(uint64_t sum, const void *data, uint32_t len);

/* What to put into a checksum field, in memory order. 0 is given as 0xffff, which is the same number: to
 * UDP 0 means "none". */
uint16_t net_csum_fold(uint64_t sum);

/* Fills in the checksum that the header left open (NEEDS_CSUM). It lies in the frame: the caller has looked. */
void net_finish_csum(uint8_t *frame, uint32_t len, const struct net_header *header);

#endif
