/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The wires that need no descriptor: nowhere, another pair (or the same: an echo), and a source. */
#include <errno.h>
#include <stdlib.h>

#include "net_fd.h"
#include "net_fit.h"
#include "net_segment.h"

int net_pair_init(struct net_pair *p)
{
	memset(p, 0, sizeof(*p));
	p->rx.counters = &p->counters;
	p->scratch = malloc(NET_FRAME_MAX);
	if (!p->scratch || net_receiver_init(&p->rx)) {
		free(p->scratch);
		return -ENOMEM;
	}
	return 0;
}

void net_pair_destroy(struct net_pair *p)
{
	net_fd_disconnect(p);
	net_receiver_destroy(&p->rx);
	free(p->scratch);
	p->scratch = NULL;
}

/* ------------------------------------------------------------------ nowhere */

static void drop(struct net_pair *p, struct net_frame *frames, unsigned n)
{
	(void)p;
	(void)frames;
	(void)n;
}

const struct net_wire_ops net_wire_drop = { .send = drop };

/* ------------------------------------------------------------------ another pair */

/* Who gets what this pair sends: a driver need not use all of its pairs, nor the same as another. */
static struct net_receiver *receiver_of(const struct net_pair *p)
{
	struct net_pair *first = p->peer, *other;

	if (likely(net_receiver_is_open(&first->rx)))
		return &first->rx;
	for (other = first->next; other && other != first; other = other->next)
		if (net_receiver_is_open(&other->rx))
			return &other->rx;
	return &first->rx;
}

static void deliver_segments(struct net_pair *p, struct net_receiver *r, const struct net_frame *whole)
{
	uint8_t headers[ENGINE_BATCH][NET_SEGMENT_HDR];
	struct net_frame frames[ENGINE_BATCH];
	struct iovec iov[ENGINE_BATCH][2];
	struct net_segments s;
	enum net_drop why;
	unsigned n;

	net_frame_copy(whole, p->scratch);
	why = net_segments_begin(&s, &whole->header, p->scratch, whole->len);
	if (why)
		net_count(&r->counters->dropped[why], 1);
	else
		do {
			for (n = 0; n < ENGINE_BATCH && net_segments_next(&s, headers[n], &frames[n], iov[n]); n++)
				;
			net_receiver_deliver(r, frames, n);
		} while (n == ENGINE_BATCH);
}

/* One that the receiver cannot take as it is. */
static void deliver_fitted(struct net_pair *p, struct net_receiver *r, struct net_frame *f)
{
	struct iovec iov;

	if (f->header.gso_type) {
		deliver_segments(p, r, f);
		return;
	}
	net_frame_fit(f, p->scratch, &iov);
	net_receiver_deliver(r, f, 1);
}

static void send_to_peer(struct net_pair *p, struct net_frame *frames, unsigned n)
{
	struct net_receiver *r = receiver_of(p);
	unsigned start = 0, i;

	/* What its driver can do is its owner's to change, until it is open. */
	for (i = 0; i < n && net_receiver_is_open(r); i++) {
		if (likely(net_frame_fits(&frames[i], &r->offloads)))
			continue;
		net_receiver_deliver(r, frames + start, i - start);
		deliver_fitted(p, r, &frames[i]);
		start = i + 1;
	}
	net_receiver_deliver(r, frames + start, n - start);
}

const struct net_wire_ops net_wire_peer = { .send = send_to_peer };

/* ------------------------------------------------------------------ a source */

static bool receive_source(struct net_pair *p)
{
	struct iovec iov = { (void *)p->source, p->source_len };
	struct net_frame frames[ENGINE_BATCH];
	uint64_t before = p->counters.rx_frames;
	unsigned n = net_receiver_fetch(&p->rx, ENGINE_BATCH), done, i;

	if (n > ENGINE_BATCH)
		n = ENGINE_BATCH;
	for (i = 0; i < n; i++)
		frames[i] = (struct net_frame){ .len = p->source_len, .num = 1, .iov = &iov };
	done = net_receiver_put(&p->rx, frames, n);
	p->rx.starved = p->counters.rx_frames == before;
	/* It was dropped. Buffers that are there and hold no frame do not grow by trying again, and those in front
	 * stay there. */
	p->rx.stuck = p->rx.starved && done;
	return !p->rx.starved;
}

const struct net_wire_ops net_wire_source = { .send = drop, .receive = receive_source };
