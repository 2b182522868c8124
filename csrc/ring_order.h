/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The byte order of a split ring. Since VIRTIO 1.0 rings are little-endian, as this machine is
 * (vring.h); those of a legacy driver are in its guest's order (VIRTIO 1.2, 2.7.3), and vhost-user's
 * SET_VRING_ENDIAN says when that is the other one. device_split.c reads and writes rings through these
 * only. It is compiled twice: here they are nothing, and in device_split_swapped.c they swap.
 */
#ifndef VHOST_RING_ORDER_H
#define VHOST_RING_ORDER_H

#include "chain_build.h"
#include "vring.h"

#ifdef RING_SWAPPED
#define ring16(x) __builtin_bswap16(x)
#define ring32(x) __builtin_bswap32(x)
#define ring64(x) __builtin_bswap64(x)
#else
#define ring16(x) ((uint16_t)(x))
#define ring32(x) ((uint32_t)(x))
#define ring64(x) ((uint64_t)(x))
#endif

/* A descriptor of a split ring, or of one of its indirect tables, as it was fetched. */
static inline struct raw_desc ring_desc(struct raw_desc d)
{
#ifdef RING_SWAPPED
	return (struct raw_desc){ ring64(d.addr), ring32(raw_len(d)) | (uint64_t)ring16(raw_third(d)) << 32 |
							  (uint64_t)ring16(raw_fourth(d)) << 48 };
#else
	return d;
#endif
}

#endif
