/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Cuts a frame that its sender left to be segmented (VIRTIO 1.2, 5.1.6.2) into frames as they would have been on
 * a wire, with all checksums: for a receiver that has not agreed to do without. TCP over IPv4 and IPv6, and
 * datagrams of UDP (UDP_L4). Knows frames in private memory; whoever sent one may be lying.
 */
#ifndef VHOST_NET_SEGMENT_H
#define VHOST_NET_SEGMENT_H

#include "net_frame.h"

#define NET_SEGMENT_HDR 256u /* bytes of all headers, at most */
#define NET_SEGMENT_MIN 64u  /* bytes of each segment, or a frame would make very many */

struct net_segments {
	const uint8_t *frame;
	uint32_t len, l3, l4, hdr; /* where IP's header begins, the next one, and where all headers end */
	uint32_t size;		   /* bytes of each segment behind its headers, but for the last */
	uint32_t at, index;	   /* what was taken */
	bool v6, tcp;
};

/* NET_PASSES, or NET_DROP_GSO: it is not what its virtio header says. `frame`: its bytes, which stay there. */
enum net_drop net_segments_begin(struct net_segments *s, const struct net_header *header, const uint8_t *frame,
				 uint32_t len);

/* The next one: its headers in `hdr`, of NET_SEGMENT_HDR bytes. False: that was all. */
bool net_segments_next(struct net_segments *s, uint8_t *hdr, struct net_frame *f, struct iovec iov[2]);

#endif
