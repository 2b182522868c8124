/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Most frames are one piece that fits into one buffer, as one writable descriptor: these are copied in a
 * loop that stages a batch at once. Everything else goes buffer by buffer.
 */
#include <errno.h>
#include <stdlib.h>

#include "net_receive.h"
#include "virtqueue_log.h"

#define PREFETCH_AHEAD 4u

int net_receiver_init(struct net_receiver *r)
{
	r->queue = NULL;
	r->starved = r->stuck = false;
	r->head = r->tail = r->made = 0;
	r->chains = calloc(NET_BUFFERS_MAX, sizeof(*r->chains));
	r->at = calloc(NET_BUFFERS_MAX, sizeof(*r->at));
	if (!r->chains || !r->at) {
		net_receiver_destroy(r);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < NET_BUFFERS_MAX; i++)
		r->at[i] = &r->chains[i];
	return 0;
}

void net_receiver_destroy(struct net_receiver *r)
{
	while (r->made)
		vhost_chain_destroy(&r->chains[--r->made]);
	free(r->chains);
	free(r->at);
	r->chains = NULL;
	r->at = NULL;
}

void net_receiver_open(struct net_receiver *r, struct engine_queue *queue)
{
	r->queue = queue;
	r->starved = r->stuck = false;
	/* Who fills it waits for frames, not for buffers. */
	virtqueue_disable_notification(queue->vq);
}

void net_receiver_settle(struct net_receiver *r)
{
	if (!r->queue)
		return;
	while (r->tail != r->head)
		virtqueue_unpop(r->queue->vq, r->at[--r->tail % NET_BUFFERS_MAX]);
	r->queue->busy = false;
}

void net_receiver_close(struct net_receiver *r)
{
	net_receiver_settle(r);
	r->queue = NULL;
}

uint32_t net_receiver_fetch(struct net_receiver *r, uint32_t want)
{
	uint32_t have = net_receiver_ahead(r);

	if (!have)
		r->head = r->tail = 0; /* those that are in the cache */
	while (have < want) {
		uint32_t from = r->tail % NET_BUFFERS_MAX, n = want - have;
		int got;

		if (n > ENGINE_BATCH)
			n = ENGINE_BATCH;
		if (n > NET_BUFFERS_MAX - from)
			n = NET_BUFFERS_MAX - from;
		while (unlikely(r->made < from + n))
			vhost_chain_init(&r->chains[r->made++]);
		got = engine_pop(r->queue, &r->at[from], n);
		if (unlikely(got < 0))
			engine_fail(r->queue);
		if (got <= 0)
			break;
		/* No prefetch of their memory: none that was tried measured faster than to write at once. */
		r->tail += (uint32_t)got;
		have += (uint32_t)got;
		if ((uint32_t)got < n)
			break;
	}
	return have;
}

/* Stages a buffer, of which the first bytes were written. Cannot fail: the chain is out, and has that room. */
static void stage(struct net_receiver *r, const struct vhost_chain *c, uint32_t written)
{
	struct virtqueue *vq = r->queue->vq;

	virtqueue_log_chain(vq, virtqueue_memory(vq), c, written);
	virtqueue_fill(vq, c->id, written);
}

void net_receiver_used(struct net_receiver *r, uint32_t n, uint32_t len)
{
	uint32_t left = r->hdr_len + len;

	for (uint32_t i = 0; i < n; i++) {
		const struct vhost_chain *c = net_receiver_buffer(r, i);
		uint32_t written = c->in_len < left ? c->in_len : left;

		stage(r, c, written);
		left -= written;
	}
	r->head += n;
	net_count(&r->counters->rx_frames, 1);
	net_count(&r->counters->rx_bytes, len);
}

/* 5.1.6.3.1: no buffer is smaller than the header. */
static void give_back_useless(struct net_receiver *r)
{
	while (net_receiver_fetch(r, 1)) {
		const struct vhost_chain *c = net_receiver_buffer(r, 0);

		if (likely(c->in_len >= r->hdr_len))
			return;
		stage(r, c, 0);
		r->head++;
		net_count(&r->counters->dropped[NET_DROP_BUFFER], 1);
	}
}

/* The first n buffers, which are all that there are, take up the whole ring: no more can come before some go. */
static bool has_all_there_can_be(const struct net_receiver *r, uint32_t n)
{
	uint32_t slots = 0;

	while (n)
		slots += net_receiver_buffer(r, --n)->ndesc;
	return slots >= r->queue->vq->num;
}

uint32_t net_receiver_room(struct net_receiver *r, uint32_t len, enum net_drop *why)
{
	uint64_t room = 0;
	uint32_t n = 0;

	*why = NET_DROP_NO_BUFFER;
	give_back_useless(r);
	while (room < (uint64_t)r->hdr_len + len) {
		if (n && (!r->mergeable || n == NET_BUFFERS_MAX)) {
			*why = NET_DROP_NO_ROOM;
			return 0;
		}
		if (net_receiver_fetch(r, n + 1) <= n) {
			if (has_all_there_can_be(r, n))
				*why = NET_DROP_NO_ROOM;
			else
				r->starved = true;
			return 0;
		}
		room += net_receiver_buffer(r, n++)->in_len;
	}
	return n;
}

/* Where the next byte goes: in some piece of some buffer. */
struct cursor {
	const struct net_receiver *r;
	const struct vhost_chain *c;
	uint32_t buffer, piece;
	size_t off;
};

static void put(struct cursor *at, const void *from, size_t n)
{
	const uint8_t *in = from;

	while (n) {
		const struct iovec *iov;
		size_t part;

		while (at->piece == at->c->in_num) {
			at->c = net_receiver_buffer(at->r, ++at->buffer);
			at->piece = 0;
		}
		iov = &at->c->iov[at->c->out_num + at->piece];
		part = iov->iov_len - at->off < n ? iov->iov_len - at->off : n;
		memmove((uint8_t *)iov->iov_base + at->off, in, part); /* a driver may receive where it sends from */
		in += part;
		n -= part;
		at->off += part;
		if (at->off == iov->iov_len) {
			at->piece++;
			at->off = 0;
		}
	}
}

/* Any frame, into any buffers. */
static enum net_drop deliver_any(struct net_receiver *r, const struct net_frame *f)
{
	struct net_header header = f->header;
	struct cursor at = { .r = r };
	enum net_drop why;
	uint32_t n;

	if (f->len > r->longest && !f->header.gso_type)
		return NET_DROP_MTU;
	n = net_receiver_room(r, f->len, &why);
	if (!n)
		return why;
	at.c = net_receiver_buffer(r, 0);
	header.num_buffers = (uint16_t)n;
	put(&at, &header, r->hdr_len);
	for (uint32_t i = 0; i < f->num; i++)
		put(&at, f->iov[i].iov_base, f->iov[i].iov_len);
	net_receiver_used(r, n, f->len);
	return NET_PASSES;
}

/* The header of a frame in one buffer. (A legacy driver's has no num_buffers.) */
static inline void put_header(uint8_t *to, const struct net_header *h, uint32_t hdr_len)
{
	memcpy(to, h, NET_HDR_LEGACY);
	if (likely(hdr_len == NET_HDR_MAX)) {
		uint16_t one = 1;

		memcpy(to + NET_HDR_LEGACY, &one, sizeof(one));
	}
}

/* As many as are of the common kind, at most n, and what is staged of them. */
static unsigned deliver_simple(struct net_receiver *r, const struct net_frame *frames, unsigned n)
{
	struct virtqueue_used used[ENGINE_BATCH];
	uint32_t hdr_len = r->hdr_len;
	uint64_t bytes = 0;
	unsigned i;

	for (i = 0; i < n; i++) {
		const struct net_frame *f = &frames[i];
		const struct vhost_chain *c = net_receiver_buffer(r, i);
		uint32_t total = hdr_len + f->len;
		uint8_t *to;

		if (unlikely(f->num != 1 || c->out_num || c->iov->iov_len < total || f->len > r->longest))
			break;
		to = c->iov->iov_base;
		if (i + PREFETCH_AHEAD < n && f->len > 64)
			__builtin_prefetch((const uint8_t *)f[PREFETCH_AHEAD].iov->iov_base + 64);
		put_header(to, &f->header, hdr_len);
		memmove(to + hdr_len, f->iov->iov_base, f->len);
		used[i] = (struct virtqueue_used){ c->id, total };
		bytes += f->len;
	}
	virtqueue_fill_batch(r->queue->vq, used, i);
	r->head += i;
	net_count(&r->counters->rx_frames, i);
	net_count(&r->counters->rx_bytes, bytes);
	return i;
}

unsigned net_receiver_put(struct net_receiver *r, const struct net_frame *frames, unsigned n)
{
	unsigned done = 0;

	while (done < n && net_receiver_is_open(r)) {
		unsigned most = n - done < ENGINE_BATCH ? n - done : ENGINE_BATCH, simple = 0;
		enum net_drop why;

		if (likely(!r->queue->vq->log)) {
			uint32_t have = net_receiver_fetch(r, most);

			simple = deliver_simple(r, frames + done, have < most ? have : most);
		}
		done += simple;
		if (simple == most || !net_receiver_is_open(r))
			continue;
		why = deliver_any(r, &frames[done]);
		if (unlikely(why)) {
			if (why == NET_DROP_NO_BUFFER)
				break;
			net_count(&r->counters->dropped[why], 1);
		}
		done++;
	}
	if (r->queue) {
		engine_publish(r->queue);
		r->queue->busy = net_receiver_ahead(r) != 0;
	}
	return done;
}

void net_receiver_deliver(struct net_receiver *r, const struct net_frame *frames, unsigned n)
{
	unsigned done = net_receiver_put(r, frames, n);

	if (unlikely(done < n))
		net_count(&r->counters->dropped[net_receiver_is_open(r) ? NET_DROP_NO_BUFFER : NET_DROP_STOPPED],
			  n - done);
}
