/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Block queues served by an engine's workers: what is between a ring and the requests (blk_request.h). What can
 * be done without waiting is done at once; for the rest the worker goes on while io_uring or a thread does it.
 */
#ifndef VHOST_ENGINE_BLK_H
#define VHOST_ENGINE_BLK_H

#include "blk_pool.h"
#include "blk_request.h"
#include "blk_uring.h"
#include "engine.h"

#define BLK_DEPTH 128u		     /* requests of a queue in flight */
#define BLK_PUBLISH_NS 20000u	     /* what is done this long ... */
#define BLK_PUBLISH_BYTES (128u << 10) /* ... or has moved as much is published before the batch ends */
#define BLK_TURN_BYTES (4u << 20)      /* as much, and it is the turn of the worker's other queues */
#define BLK_TRIAL_BYTES (64u << 10)    /* a write of at most this is tried by the worker ... */
#define BLK_TRIAL_NS 100000u	       /* ... and, when it took longer, ... */
#define BLK_SLOW_WRITES 128u	       /* ... not again for as many */

enum blk_aio {
	BLK_AIO_SYNC,	 /* the worker waits itself */
	BLK_AIO_THREADS, /* those of a pool do */
	BLK_AIO_URING,	 /* nobody does, or a pool where the kernel does not allow that */
};

struct blk_queue {
	struct engine_queue engine; /* first: its operations find the rest */
	const struct blk_disk *disk;
	bool writethrough;
	enum blk_aio aio;
	bool now[2];	     /* the file can be told not to wait: to read, to write */
	unsigned slow;	     /* writes that are not tried */
	unsigned in_flight;  /* requests that somebody else does */
	struct blk_uring *uring; /* NULL: not needed so far */
	struct blk_pool_user pool;
	int wake; /* an eventfd: something came back; -1: nothing ever does */
	unsigned depth;
	struct blk_request *requests; /* depth */
	struct iovec *joint;	      /* BLK_MERGE_MAX for each */
	/* Chains of the requests that are free, from `first` to `depth`: popped into as they lie there. */
	struct vhost_chain *chains[BLK_DEPTH];
	unsigned first;
	/* What was done, and is not staged yet. */
	struct virtqueue_used used[ENGINE_BATCH];
	unsigned nused;
	uint32_t moved; /* bytes since something was published last */
};

/* The disk and the pool are the owner's, until blk_queue_destroy. The pool is not needed for BLK_AIO_SYNC. 0 or a
 * negative errno. */
int blk_queue_init(struct blk_queue *q, const struct blk_disk *disk, enum blk_aio aio,
		   struct blk_pool *pool, bool writethrough);
void blk_queue_destroy(struct blk_queue *q); /* which is not attached any more */

extern const struct engine_ops blk_engine_ops;

#endif
