/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Serves network queues: what is sent in batches, and what is received when its wire has something. */
#include "engine_net.h"

static inline struct net_pair *pair_of(struct engine_queue *q)
{
	return ((struct net_queue *)q)->pair;
}

/* ------------------------------------------------------------------ what the driver sends */

/* Checks n chains that were popped; those that are frames come to `frames`: how many. */
static unsigned take_frames(struct net_pair *p, struct vhost_chain **batch, unsigned n, struct net_frame *frames)
{
	uint64_t bytes = 0;
	unsigned count = 0, i;

	for (i = 0; i < n; i++) {
		enum net_drop why = net_frame_take(&frames[count], batch[i], &p->rules);

		if (likely(!why))
			bytes += frames[count++].len;
		else
			net_count(&p->counters.dropped[why], 1);
	}
	net_count(&p->counters.tx_frames, count);
	net_count(&p->counters.tx_bytes, bytes);
	return count;
}

static bool serve_transmit(struct engine_worker *w, struct engine_queue *q)
{
	struct net_pair *p = pair_of(q);
	struct vhost_chain *batch[ENGINE_BATCH];
	struct virtqueue_used used[ENGINE_BATCH];
	struct net_frame frames[ENGINE_BATCH];
	unsigned count;
	int n, i;

	for (i = 0; i < (int)ENGINE_BATCH; i++)
		batch[i] = &w->chains[i];
	n = engine_pop(q, batch, ENGINE_BATCH);
	if (n <= 0) {
		if (unlikely(n < 0))
			engine_fail(q);
		return false;
	}
	for (i = 0; i < n; i++) {
		__builtin_prefetch(batch[i]->iov->iov_base);
		used[i] = (struct virtqueue_used){ batch[i]->id, 0 };
	}
	count = take_frames(p, batch, (unsigned)n, frames);
	if (likely(count))
		p->wire->send(p, frames, count);
	/* Cannot fail: the chains are out, and nothing was written. */
	virtqueue_fill_batch(q->vq, used, (unsigned)n);
	engine_publish(q);
	return true;
}

const struct engine_ops net_transmit_ops = {
	.serve = serve_transmit,
	.has_work = engine_has_work,
	.arm = engine_arm,
};

/* ------------------------------------------------------------------ what it receives */

/* Frames that found no buffer wait on the wire until there are some again. */
static bool has_buffers_again(struct engine_queue *q)
{
	struct net_pair *p = pair_of(q);

	return p->wire->receive && p->rx.starved && !p->rx.stuck && virtqueue_has_work(q->vq);
}

static bool serve_receive(struct engine_worker *w, struct engine_queue *q)
{
	struct net_pair *p = pair_of(q);
	bool busy;

	(void)w;
	if (!p->wire->receive || !p->rx.queue || p->rx.stuck || (p->rx.starved && !virtqueue_has_work(q->vq)))
		return false;
	busy = p->wire->receive(p);
	if (p->rx.starved)
		q->armed = false; /* a kick is wanted from here on, and was not before */
	return busy;
}

static bool arm_receive(struct engine_queue *q)
{
	struct net_pair *p = pair_of(q);

	return p->wire->receive && p->rx.starved && !p->rx.stuck && engine_arm(q);
}

/* From here on frames find it, whichever queue is served first. */
static void begin_receive(struct engine_queue *q)
{
	net_receiver_open(&pair_of(q)->rx, q);
}

static void settle_receive(struct engine_queue *q)
{
	struct net_receiver *r = &pair_of(q)->rx;

	if (r->queue != q)
		return;
	if (q->leaving)
		net_receiver_close(r);
	else
		net_receiver_settle(r);
}

const struct engine_ops net_receive_ops = {
	.serve = serve_receive,
	.has_work = has_buffers_again,
	.arm = arm_receive,
	.begin = begin_receive,
	.settle = settle_receive,
};

/* ------------------------------------------------------------------ from elsewhere */

void net_queue_deliver(struct net_queue *q, const void *frame, uint32_t len)
{
	struct iovec iov = { (void *)frame, len };
	struct net_frame f = { .len = len, .num = 1, .iov = &iov };

	engine_hold(&q->engine);
	net_receiver_deliver(&q->pair->rx, &f, 1);
	net_receiver_settle(&q->pair->rx);
	/* To look at the ring ended what its worker had asked of the driver. */
	engine_release(&q->engine, true);
}
