/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What a network driver and its device put before each frame (VIRTIO 1.2, 5.1.6). Layout only. */
#ifndef VHOST_VIRTIO_NET_H
#define VHOST_VIRTIO_NET_H

#include <stdint.h>

#define NET_HDR_LEGACY 10u /* without VERSION_1 and MRG_RXBUF (5.1.6.1) */
#define NET_HDR_MAX 12u
#define NET_ETH_HDR 14u
#define NET_VLAN_TAG 4u
/* The longest frame that there is: a segmented packet of 64 KiB behind an Ethernet header (5.1.6.3.1),
 * and a tag. */
#define NET_FRAME_MAX (65536u + NET_ETH_HDR + NET_VLAN_TAG)

/* Of `flags`. */
#define NET_HDR_F_NEEDS_CSUM 1
#define NET_HDR_F_DATA_VALID 2

/* Of `gso_type`. ECN comes on top of the TCP ones. */
#define NET_GSO_NONE 0
#define NET_GSO_TCPV4 1
#define NET_GSO_UDP 3
#define NET_GSO_TCPV6 4
#define NET_GSO_UDP_L4 5
#define NET_GSO_ECN 0x80

struct net_header {
	uint8_t flags, gso_type;
	uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

_Static_assert(sizeof(struct net_header) == NET_HDR_MAX, "5.1.6");

#endif
