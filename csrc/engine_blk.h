/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Block queues served without the GIL: worker threads that take batches off rings, run the requests
 * (blk_request.h) and tell the driver. Knows nothing of Python, of vhost-user, or of how a queue came
 * to be; whoever attaches one keeps its ring, its memory and the disk alive until it has detached it.
 *
 *   engine  1 --- n  worker (a thread while it has queues)  1 --- n  queue
 */
#ifndef VHOST_ENGINE_BLK_H
#define VHOST_ENGINE_BLK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "blk_request.h"
#include "call.h"
#include "virtqueue.h"

#define BLK_BATCH 32u	       /* chains taken with one look at the ring */
#define BLK_PUBLISH_NS 20000u  /* what is done this long is published before the batch ends */

struct blk_worker;

struct blk_queue {
	struct virtqueue *vq;
	const struct blk_disk *disk;
	bool writethrough;
	/* Our own descriptors: the owner may close or replace his while a worker runs. -1: none. */
	int kick;
	struct virtqueue_call call;
	/* The worker's own. */
	bool armed; /* the driver was asked to kick */
	bool failed;
	bool missed; /* it waits for its IOTLB, and the owner was told */
	struct blk_queue *next;
	struct blk_worker *worker; /* NULL: not attached */
	bool leaving, gone;	   /* under the worker's lock */
};

struct blk_worker {
	struct blk_engine *engine;
	pthread_mutex_t lock;
	pthread_cond_t handed_over;
	pthread_t thread;
	bool running;
	int epoll, wake;
	unsigned attached;	    /* queues, those that are on their way included */
	struct blk_queue *incoming; /* under the lock */
	bool changed;		    /* atomic: look at `incoming`, `hold`, and for `leaving` */
	unsigned hold;		    /* under the lock: who wants the thread to keep off its queues ... */
	bool parked;		    /* ... and whether it does: while it sleeps, anyway */
	struct blk_queue *queues;   /* the thread's own */
	/* The thread's own: how long looking pays off at present, how often at full length it did not,
	 * and for how many sleeps we do not look at all. */
	uint32_t spin_ns, futile, rest;
	int repairs;		    /* the thread's own: how many it has told of */
	struct vhost_chain chains[BLK_BATCH];
};

struct blk_engine {
	unsigned nworkers;
	struct blk_worker *workers;
	char name[10];		 /* of the threads: NAME/0, NAME/1 ... */
	pid_t pid;		 /* of the process that has the threads: a fork has none */
	pthread_mutex_t control; /* one attach or detach at a time */
	uint32_t max_spin_ns;	 /* 0: never spin */
	unsigned spinners;	 /* atomic: workers that spin at this moment ... */
	unsigned max_spinners;	 /* ... and how many may, so that one CPU is left to the driver */
	const int *repairs;	 /* atomic: sigbus_repairs() of whoever maps the memory */
	int notice;		 /* eventfd: a queue or its memory broke */
};

/* 0 or a negative errno. `repairs`: see sigbus_repairs(). */
int blk_engine_init(struct blk_engine *e, unsigned nworkers, const char *name, const int *repairs);

/* An eventfd that is signalled when a queue broke, memory below one did, or a queue missed a mapping; read
 * by nobody. The queue's owner finds the report then, and tells the driver or its side. */
static inline int blk_engine_notice(const struct blk_engine *e)
{
	return e->notice;
}

/* Everything must be detached. */
void blk_engine_destroy(struct blk_engine *e);

/* The queue as its owner describes it; -1 for a descriptor that there is not. */
struct blk_queue_config {
	struct virtqueue *vq;
	const struct blk_disk *disk;
	bool writethrough;
	int kick;
	struct virtqueue_call call;
};

/*
 * Hands the queue to a worker, which looks at it at once. From here to the return of detach the ring
 * belongs to that worker alone. 0 or a negative errno (-EPERM: the kick cannot be waited for; -ESRCH: the
 * engine is another process's, of which this one was forked).
 */
int blk_engine_attach(struct blk_engine *e, unsigned worker, struct blk_queue *q,
		      const struct blk_queue_config *cfg);

/* Takes the queue back once what was popped is published. Harmless if it is not attached. */
void blk_engine_detach(struct blk_engine *e, struct blk_queue *q);

/*
 * Between the two, no queue of the worker that has this one is used, nor anything that they translate with.
 * Cheaper than to detach and attach, above all while the worker sleeps. Any thread may hold, and several at
 * a time; nobody attaches or detaches while he does. Does nothing for a queue that is not attached.
 * `look`: there may be work that no kick tells of.
 */
void blk_engine_hold(struct blk_queue *q);
void blk_engine_release(struct blk_queue *q, bool look);

/*
 * Serves up to `budget` chains of a queue that is not attached in the calling thread, publishes
 * them and returns how many it took; -1: the queue broke, see vq->report. Notifying is the caller's.
 */
int blk_queue_drain(struct virtqueue *vq, const struct blk_disk *disk, bool writethrough,
		    unsigned budget);

#endif
