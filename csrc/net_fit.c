/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#include "net_csum.h"
#include "net_fit.h"

enum net_drop net_frame_fit(struct net_frame *f, uint8_t *to, struct iovec *iov)
{
	if (f->header.gso_type)
		return NET_DROP_GSO;
	if (f->iov->iov_base != to)
		net_frame_copy(f, to);
	if (f->header.flags & NET_HDR_F_NEEDS_CSUM)
		net_finish_csum(to, f->len, &f->header);
	memset(&f->header, 0, sizeof(f->header));
	*iov = (struct iovec){ to, f->len };
	f->iov = iov;
	f->num = 1;
	return NET_PASSES;
}
