/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Serves block queues: takes batches off the ring, does at once what need not be waited for, submits the rest
 * together, takes in what came back, and publishes no later than is good.
 *
 * A flush covers the writes that were completed before the driver sent it (5.2.6.2). Those are in the page
 * cache or beyond by then, whoever did them, so that it waits for nobody and is submitted like the rest.
 */
#include "engine_blk.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "barrier.h"
#include "virtqueue_log.h"

static void fault(struct virtqueue *vq, const struct vhost_chain *c, enum virtqueue_fault what)
{
	vq->report.head = c->id;
	vq->report.value = blk_request_missing(c, what, &vq->report.limit);
	STORE_RELEASE(vq->report.fault, what); /* others look for it at any time */
}

/* ------------------------------------------------------------------ what was done */

static void stage(struct blk_queue *q)
{
	/* Cannot fail: the chains are out, and no more was written than they have room for. */
	virtqueue_fill_batch(q->engine.vq, q->used, q->nused);
	q->nused = 0;
}

static void publish(struct blk_queue *q)
{
	stage(q);
	engine_publish(&q->engine);
	q->moved = 0;
}

/* The request has its status: its chain goes back to the driver. */
static void finish(struct blk_queue *q, struct blk_request *r)
{
	struct virtqueue *vq = q->engine.vq;
	struct vhost_chain *c = &r->chain;

	if (q->nused == ENGINE_BATCH)
		stage(q);
	q->used[q->nused++] = (struct virtqueue_used){ c->id, blk_request_end(r) };
	/* Data that was read fills them, and the status is at their end, whatever was read. */
	virtqueue_log_chain(vq, virtqueue_memory(vq), c, c->in_len);
}

static void finish_op(struct blk_queue *q, struct blk_request *op)
{
	struct blk_request *next;

	for (; op; op = next) {
		next = op->joined;
		finish(q, op);
		q->chains[--q->first] = &op->chain;
		q->in_flight--;
	}
}

/* ------------------------------------------------------------------ what somebody else does */

static void submit(struct blk_queue *q, struct blk_request *list)
{
	struct blk_request *next;

	if (q->uring)
		list = blk_uring_submit(q->uring, q->disk, list);
	for (; list; list = next) {
		next = list->next;
		blk_pool_submit(&q->pool, list);
	}
}

/* Takes in what came back. */
static bool reap(struct blk_queue *q)
{
	unsigned before = q->in_flight;
	struct blk_request *op, *next;
	bool rest;

	if (likely(!before))
		return false;
	while (q->uring && (op = blk_uring_reap(q->uring, &rest))) {
		if (likely(!rest))
			finish_op(q, op);
		else
			blk_pool_submit(&q->pool, op);
	}
	for (op = blk_pool_reap(&q->pool); op; op = next) {
		next = op->next;
		finish_op(q, op);
	}
	return q->in_flight != before;
}

static bool came_back(const struct blk_queue *q)
{
	return q->in_flight &&
	       ((q->uring && blk_uring_ready(q->uring)) || blk_pool_ready(&q->pool));
}

/* Waits for everything that is in flight. With nothing of it, the queue may be somebody else's already. */
static void settle(struct engine_queue *eq)
{
	struct blk_queue *q = (struct blk_queue *)eq;

	if (!q->in_flight)
		return;
	while (q->in_flight) {
		if (q->uring && blk_uring_out(q->uring))
			blk_uring_wait(q->uring);
		else
			blk_pool_wait(&q->pool);
		reap(q);
	}
	publish(q);
	eq->busy = false;
}

/* ------------------------------------------------------------------ a batch */

/*
 * The page cache takes nearly every write at once, and most file systems cannot be asked to refuse the others
 * (RWF_NOWAIT). To leave all of them to somebody else costs more than a few that wait: so it is tried, and when
 * one took long, the next ones are somebody else's.
 */
static bool write_by_trial(struct blk_queue *q, struct blk_request *r)
{
	uint64_t since;
	int rc;

	if (q->slow) {
		q->slow--;
		return false;
	}
	if (r->data.len > BLK_TRIAL_BYTES)
		return false;
	since = engine_now_ns();
	rc = blk_disk_move(q->disk, true, &r->data, &r->at, false);
	if (engine_now_ns() - since > BLK_TRIAL_NS)
		q->slow = BLK_SLOW_WRITES;
	blk_request_done(r, rc ? -EIO : 0);
	return true;
}

/* Does what was parsed if nobody has to wait for it, or if the worker is to wait itself. */
static bool do_now(struct blk_queue *q, struct blk_request *r)
{
	bool write = r->todo == BLK_WRITE;
	int rc;

	/* What is in memory is there: to flush it is a system call that does nothing. */
	if (q->aio == BLK_AIO_SYNC || (r->todo == BLK_FLUSH && q->disk->pace == BLK_MEMORY)) {
		blk_request_run(q->disk, r);
		return true;
	}
	if (r->todo != BLK_READ && !write)
		return false;
	if (q->disk->pace == BLK_WAITS || (r->stable && write && q->disk->pace != BLK_MEMORY))
		return false;
	rc = q->now[write] ? blk_disk_move_now(q->disk, write, &r->data, &r->at) : -EOPNOTSUPP;
	if (rc == -EOPNOTSUPP) {
		q->now[write] = false;
		return write && write_by_trial(q, r);
	}
	if (rc == -EAGAIN)
		return false;
	blk_request_done(r, rc ? -EIO : 0);
	return true;
}

/* Whether what was done by now should not wait for the end of the batch. Where nobody waits, time goes with the
 * bytes that are moved. */
static bool is_due(struct blk_queue *q, const struct blk_request *r, uint64_t since)
{
	q->moved += r->room + r->chain.out_len;
	if (q->aio != BLK_AIO_SYNC || q->disk->fd < 0)
		return q->moved > BLK_PUBLISH_BYTES && q->disk->fd >= 0;
	return engine_now_ns() - since > BLK_PUBLISH_NS;
}

/* What somebody else does is no longer among the free: it changes places with the first of these. */
static void take(struct blk_queue *q, struct vhost_chain **at)
{
	struct vhost_chain *c = *at;

	*at = q->chains[q->first];
	q->chains[q->first++] = c;
	q->in_flight++;
}

/* The chains that were popped, of which `n` lie at q->first. False: one was no request. */
static bool run(struct engine_worker *w, struct blk_queue *q, int n)
{
	bool waits = q->aio == BLK_AIO_SYNC && q->disk->fd >= 0 && n > 1;
	struct vhost_chain **batch = &q->chains[q->first];
	uint64_t since = waits ? engine_now_ns() : 0;
	struct virtqueue *vq = q->engine.vq;
	enum virtqueue_fault f = VQ_OK;
	struct blk_batch later;
	struct blk_request *r;
	uint64_t moved = 0;
	int i;

	blk_batch_init(&later);
	for (i = 0; i < n; i++) {
		r = (struct blk_request *)batch[i];
		f = blk_request_parse(q->disk, r, q->writethrough);
		if (unlikely(f)) {
			fault(vq, &r->chain, f);
			break;
		}
		if (r->todo == BLK_NOTHING || do_now(q, r)) {
			finish(q, r);
			/* Nobody waits for the slowest of a batch: what took its time goes out at once. */
			if (i + 1 < n && is_due(q, r, since)) {
				publish(q);
				since = engine_now_ns();
			}
		} else {
			blk_batch_add(&later, r);
			take(q, &batch[i]);
		}
		moved += r->room + r->chain.out_len;
		/* Who takes a queue back waits for the request at hand, not for as much as a guest can
		 * put into a batch: a session's thread has others to serve. So has the worker. The newest
		 * goes first. */
		if (unlikely(engine_changes(w) || moved > BLK_TURN_BYTES) && q->disk->fd >= 0)
			while (n > i + 1)
				virtqueue_unpop(vq, batch[--n]);
	}
	submit(q, later.first);
	return !f;
}

static bool serve(struct engine_worker *w, struct engine_queue *eq)
{
	struct blk_queue *q = (struct blk_queue *)eq;
	unsigned room = q->depth - q->first;
	bool came = reap(q), ok = true;
	int n = 0;

	if (came)
		room = q->depth - q->first;
	if (room)
		n = engine_pop(eq, &q->chains[q->first], room < ENGINE_BATCH ? room : ENGINE_BATCH);
	if (n > 0)
		ok = run(w, q, n);
	if (!n && !came)
		return false;
	publish(q);
	if (came && eq->armed) { /* so that it is asked to wake us again */
		virtqueue_disable_notification(eq->vq);
		eq->armed = false;
	}
	if (q->uring && !eq->armed)
		blk_uring_wake(q->uring, false);
	eq->busy = q->in_flight;
	if (unlikely(n < 0 || !ok)) {
		settle(eq); /* what came before is answered */
		engine_fail(eq);
		return false;
	}
	return true;
}

static bool has_work(struct engine_queue *eq)
{
	struct blk_queue *q = (struct blk_queue *)eq;

	return (q->first < q->depth && engine_has_work(eq)) || came_back(q);
}

static bool arm(struct engine_queue *eq)
{
	struct blk_queue *q = (struct blk_queue *)eq;

	if (q->uring) {
		blk_uring_wake(q->uring, true);
		/* Our wish before the last look; pairs with the kernel's between the entry in its queue and
		 * its look at the wish. */
		FULL_BARRIER();
	}
	return (engine_arm(eq) && q->first < q->depth) || came_back(q);
}

const struct engine_ops blk_engine_ops = {
	.serve = serve,
	.has_work = has_work,
	.arm = arm,
	.settle = settle,
};

/* ------------------------------------------------------------------ its life */

int blk_queue_init(struct blk_queue *q, const struct blk_disk *disk, enum blk_aio aio,
		   struct blk_pool *pool, bool writethrough)
{
	unsigned i;

	memset(q, 0, sizeof(*q));
	q->disk = disk;
	q->writethrough = writethrough;
	q->aio = disk->fd < 0 ? BLK_AIO_SYNC : aio;
	q->now[0] = q->now[1] = true;
	q->depth = q->aio == BLK_AIO_SYNC ? ENGINE_BATCH : BLK_DEPTH;
	q->wake = -1;
	q->requests = calloc(q->depth, sizeof(*q->requests));
	q->joint = q->aio == BLK_AIO_SYNC ? NULL :
					    calloc(q->depth * BLK_MERGE_MAX, sizeof(*q->joint));
	if (q->aio != BLK_AIO_SYNC)
		q->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!q->requests || (q->aio != BLK_AIO_SYNC && (!q->joint || q->wake < 0))) {
		int rc = q->requests && q->joint ? -errno : -ENOMEM;

		blk_queue_destroy(q);
		return rc;
	}
	for (i = 0; i < q->depth; i++) {
		vhost_chain_init(&q->requests[i].chain);
		if (q->joint)
			q->requests[i].joint_iov = q->joint + i * BLK_MERGE_MAX;
		q->chains[i] = &q->requests[i].chain;
	}
	/* Here rather than when it is needed first: what a queue takes of the process is always the same. Where
	 * there are too many by now, or in a build without it, the pool does it all. */
	if (q->aio == BLK_AIO_URING)
		q->uring = blk_uring_new(q->depth, q->wake);
	if (q->aio != BLK_AIO_SYNC)
		blk_pool_enter(&q->pool, pool, disk, q->wake);
	return 0;
}

void blk_queue_destroy(struct blk_queue *q)
{
	unsigned i;

	if (!q->disk) /* it never was one */
		return;
	blk_uring_free(q->uring);
	if (q->pool.pool)
		blk_pool_leave(&q->pool);
	if (q->wake >= 0)
		close(q->wake);
	for (i = 0; q->requests && i < q->depth; i++)
		vhost_chain_destroy(&q->requests[i].chain);
	free(q->requests);
	free(q->joint);
	memset(q, 0, sizeof(*q));
}
