/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a frame leaves to who receives it (a checksum, segmentation), and what to do with one whose receiver
 * has not agreed to that. Knows frames; knows neither rings nor wires.
 */
#ifndef VHOST_NET_FIT_H
#define VHOST_NET_FIT_H

#include "net_frame.h"

/* May it be given to who can do this much? */
static inline bool net_frame_fits(const struct net_frame *f, const struct net_offloads *able)
{
	if (likely(net_frame_is_plain(f)))
		return true;
	return able->csum && (!f->header.gso_type || net_offloads_gso(able, f->header.gso_type));
}

/*
 * Makes one fit that does not: NET_PASSES, or why it cannot be done. It is then one piece in `to`, which has
 * f->len bytes, and may be where it lies already; `iov` is to describe it.
 */
enum net_drop net_frame_fit(struct net_frame *f, uint8_t *to, struct iovec *iov);

#endif
