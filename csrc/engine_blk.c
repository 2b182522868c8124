/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Serves block queues: takes batches off the ring, runs them, and publishes no later than is good. */
#include "barrier.h"
#include "engine_blk.h"
#include "virtqueue_log.h"

static void fault(struct virtqueue *vq, const struct vhost_chain *c, enum virtqueue_fault what)
{
	vq->report.head = c->id;
	vq->report.value = blk_request_missing(c, what, &vq->report.limit);
	STORE_RELEASE(vq->report.fault, what); /* others look for it at any time */
}

/* Runs chains that were popped. False: one was no request; those before it are staged. */
static bool run(struct virtqueue *vq, const struct blk_disk *disk, bool writethrough,
		struct vhost_chain *c)
{
	enum virtqueue_fault f;
	uint32_t written;

	f = blk_request_serve(disk, c, writethrough, &written);
	if (unlikely(f)) {
		fault(vq, c, f);
		return false;
	}
	/* Data that was read fills them, and the status is at their end, whatever was read. */
	virtqueue_log_chain(vq, virtqueue_memory(vq), c, c->in_len);
	/* Cannot fail: the chain is out, and no more was written than it has room for. */
	virtqueue_fill(vq, c->id, written);
	return true;
}

static bool serve(struct engine_worker *w, struct engine_queue *eq)
{
	struct blk_queue *q = (struct blk_queue *)eq;
	struct vhost_chain *batch[ENGINE_BATCH];
	uint64_t since = 0;
	bool slow = q->disk->fd >= 0, ok = true;
	int i, n;

	for (i = 0; i < (int)ENGINE_BATCH; i++)
		batch[i] = &w->chains[i];
	n = engine_pop(w, eq, batch, ENGINE_BATCH);
	if (!n)
		return false;
	if (slow && n > 1)
		since = engine_now_ns();
	for (i = 0; i < n && ok; i++) {
		ok = run(eq->vq, q->disk, q->writethrough, batch[i]);
		/* Nobody waits for the slowest of a batch: what took its time goes out at once. */
		if (slow && i + 1 < n && engine_now_ns() - since > BLK_PUBLISH_NS) {
			engine_publish(eq);
			since = engine_now_ns();
		}
		/* Who takes a queue back waits for the request at hand, not for as much as a guest can
		 * put into a batch: a session's thread has others to serve. The newest goes first. */
		if (unlikely(slow && engine_changes(w)))
			while (n > i + 1)
				virtqueue_unpop(eq->vq, batch[--n]);
	}
	engine_publish(eq);
	if (unlikely(n < 0 || !ok)) {
		engine_fail(w, eq);
		return false;
	}
	return true;
}

const struct engine_ops blk_engine_ops = {
	.serve = serve,
	.has_work = engine_has_work,
	.arm = engine_arm,
};

int blk_queue_drain(struct virtqueue *vq, const struct blk_disk *disk, bool writethrough,
		    unsigned budget)
{
	struct vhost_chain chain;
	unsigned done = 0;
	int rc = 0;

	vhost_chain_init(&chain);
	while (done < budget && (rc = virtqueue_pop(vq, &chain)) > 0) {
		if (!run(vq, disk, writethrough, &chain)) {
			rc = -1;
			break;
		}
		done++;
	}
	virtqueue_flush(vq);
	vhost_chain_destroy(&chain);
	return rc < 0 ? -1 : (int)done;
}

