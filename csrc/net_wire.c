/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The wires that need no descriptor: nowhere, another pair (or the same: an echo), and a source. */
#include <errno.h>
#include <stdlib.h>

#include "net_csum.h"
#include "net_wire.h"

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
	net_receiver_destroy(&p->rx);
	free(p->scratch);
	p->scratch = NULL;
}

/* ------------------------------------------------------------------ nowhere */

static void drop(struct engine_worker *w, struct net_pair *p, struct net_frame *frames, unsigned n)
{
	(void)w;
	(void)p;
	(void)frames;
	(void)n;
}

const struct net_wire_ops net_wire_drop = { .send = drop };

/* ------------------------------------------------------------------ another pair */

/* Does the receiver's driver do what the frame leaves to it? */
static inline bool can_take(const struct net_receiver *r, const struct net_frame *f)
{
	if (likely(net_frame_is_plain(f)))
		return true;
	return r->offloads.csum && (!f->header.gso_type || net_offloads_gso(&r->offloads, f->header.gso_type));
}

static void deliver_finished(struct engine_worker *w, struct net_pair *p, const struct net_frame *f)
{
	struct iovec iov = { p->scratch, f->len };
	struct net_frame done = { .len = f->len, .num = 1, .iov = &iov };

	net_frame_copy(f, p->scratch);
	net_finish_csum(p->scratch, f->len, &f->header);
	net_receiver_deliver(w, &p->peer->rx, &done, 1);
}

static void send_to_peer(struct engine_worker *w, struct net_pair *p, struct net_frame *frames, unsigned n)
{
	struct net_receiver *r = &p->peer->rx;
	unsigned start = 0, i;

	for (i = 0; i < n; i++) {
		if (likely(can_take(r, &frames[i])))
			continue;
		net_receiver_deliver(w, r, frames + start, i - start);
		deliver_finished(w, p, &frames[i]);
		start = i + 1;
	}
	net_receiver_deliver(w, r, frames + start, n - start);
}

const struct net_wire_ops net_wire_peer = { .send = send_to_peer };

/* ------------------------------------------------------------------ a source */

static bool receive_source(struct engine_worker *w, struct net_pair *p)
{
	struct iovec iov = { (void *)p->source, p->source_len };
	struct net_frame frames[ENGINE_BATCH];
	uint64_t before = p->counters.rx_frames;
	unsigned n = net_receiver_fetch(w, &p->rx, ENGINE_BATCH), i;

	if (n > ENGINE_BATCH)
		n = ENGINE_BATCH;
	for (i = 0; i < n; i++)
		frames[i] = (struct net_frame){ .len = p->source_len, .num = 1, .iov = &iov };
	net_receiver_put(w, &p->rx, frames, n);
	/* Buffers that are there and hold no frame do not grow by trying again. */
	p->rx.starved = p->counters.rx_frames == before;
	return !p->rx.starved;
}

const struct net_wire_ops net_wire_source = { .send = drop, .receive = receive_source };
