/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What is left of a chain's readable or of its writable iovecs, which are eaten from their front. Knows
 * iovecs, nothing of what is in them.
 *
 * They are the private copies that a chain is popped into; the memory that they point at is the guest's, and
 * is read once: what is taken goes into a local, and is checked there.
 */
#ifndef VHOST_BLK_SPAN_H
#define VHOST_BLK_SPAN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "barrier.h"

struct blk_span {
	struct iovec *iov;
	uint32_t num;
	uint32_t len;
	size_t cut; /* bytes that the first of them lost */
};

/* The first iovec as it was popped. */
static inline void span_mend(struct blk_span *s)
{
	s->iov->iov_base = (char *)s->iov->iov_base - s->cut;
	s->iov->iov_len += s->cut;
	s->cut = 0;
}

static inline void span_skip(struct blk_span *s, size_t n)
{
	s->len -= n;
	while (n && n >= s->iov->iov_len) {
		n -= s->iov->iov_len;
		if (unlikely(s->cut))
			span_mend(s);
		s->iov++;
		s->num--;
	}
	if (n) {
		s->iov->iov_base = (char *)s->iov->iov_base + n;
		s->iov->iov_len -= n;
		s->cut += n;
	}
}

/* The next n bytes, which must be there, into private memory; read exactly once. */
static inline void span_take(struct blk_span *s, void *to, size_t n)
{
	char *out = to;
	size_t piece;

	while (n) {
		piece = s->iov->iov_len < n ? s->iov->iov_len : n;
		memcpy(out, s->iov->iov_base, piece);
		span_skip(s, piece);
		out += piece;
		n -= piece;
	}
	/* Without this the compiler may load a field from guest memory again, after its check. */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline void span_put(struct blk_span *s, const void *from, size_t n)
{
	const char *in = from;
	size_t piece;

	while (n) {
		piece = s->iov->iov_len < n ? s->iov->iov_len : n;
		memcpy(s->iov->iov_base, in, piece);
		span_skip(s, piece);
		in += piece;
		n -= piece;
	}
}

static inline uint8_t *span_cut_last_byte(struct blk_span *s)
{
	struct iovec *last = &s->iov[s->num - 1];

	s->len--;
	if (!--last->iov_len)
		s->num--;
	return (uint8_t *)last->iov_base + last->iov_len;
}

#endif
