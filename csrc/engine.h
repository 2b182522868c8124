/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Queues served without the GIL: worker threads that look at rings, let a device's code run what is
 * there, and sleep when there is nothing. Knows nothing of what a request is (engine_blk.h), of Python, of
 * vhost-user, or of how a queue came to be; whoever attaches one keeps its ring and its memory alive until
 * it has detached it.
 *
 *   engine  1 --- n  worker (a thread while it has queues)  1 --- n  queue
 *
 * One thread serves all the queues of a worker, so that those may use each other's without a lock.
 */
#ifndef VHOST_ENGINE_H
#define VHOST_ENGINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "call.h"
#include "virtqueue.h"

#define ENGINE_BATCH 32u	   /* chains taken with one look at the ring */
#define ENGINE_SPIN_MAX_NS 32000u /* as long as a worker looks for work before it sleeps */

struct engine_worker;
struct engine_queue;

/* What a device does with its queues. All of it runs in the worker's thread. */
struct engine_ops {
	/* One batch. True if there was work. */
	bool (*serve)(struct engine_worker *w, struct engine_queue *q);
	/* Is there something to serve? A cheap look, between two sleeps. */
	bool (*has_work)(struct engine_queue *q);
	/* Asks for all that would wake the worker. True: there is work already. */
	bool (*arm)(struct engine_queue *q);
	/* The worker has the queue from here on, and may have served others of its own already. NULL: it need not
	 * be told. */
	void (*begin)(struct engine_queue *q);
	/* Someone else wants the queue, or what it translates with: nothing that was popped is in flight
	 * afterwards, it is published or given back. NULL: nothing ever is, between two batches. */
	void (*settle)(struct engine_queue *q);
};

struct engine_queue {
	struct virtqueue *vq;
	const struct engine_ops *ops;
	/* Our own descriptors: the owner may close or replace his while a worker runs. -1: none. */
	int kick;
	int source; /* something else that there may be work for the queue from; waited for as a kick is */
	struct virtqueue_call call;
	const struct engine *owner; /* whose notice tells of it */
	/* The worker's own. */
	bool armed; /* the driver was asked to kick */
	bool failed;
	bool missed; /* it waits for its IOTLB, and the owner was told */
	bool busy;   /* something that was popped is in flight: not even a sleeping worker is parked */
	struct engine_queue *next;
	struct engine_worker *worker; /* NULL: not attached */
	bool leaving, gone;	      /* under the worker's lock */
};

struct engine_worker {
	struct engine *engine;
	int cpu; /* that it runs on; -1: any */
	pthread_mutex_t lock;
	pthread_cond_t handed_over;
	pthread_t thread;
	bool running;
	int epoll, wake;
	unsigned attached;	       /* atomic: queues, those that are on their way included */
	struct engine_queue *incoming; /* under the lock */
	bool changed;		       /* atomic: look at `incoming`, `hold`, and for `leaving` */
	unsigned hold;		       /* under the lock: who wants the thread to keep off its queues ... */
	bool parked;		       /* ... and whether it does: while it sleeps with nothing in flight, anyway */
	struct engine_queue *queues;   /* the thread's own */
	/* The thread's own: how long looking pays off at present, how often at full length it did not,
	 * and for how many sleeps we do not look at all. */
	uint32_t spin_ns, futile, rest;
	int repairs;		       /* the thread's own: how many it has told of */
	struct vhost_chain chains[ENGINE_BATCH]; /* for whoever serves, from one batch to the next nobody's */
};

struct engine {
	unsigned nworkers;
	struct engine_worker *workers;
	char name[10];		 /* of the threads: NAME/0, NAME/1 ... */
	pid_t pid;		 /* of the process that has the threads: a fork has none */
	pthread_mutex_t control; /* one attach or detach at a time */
	uint32_t max_spin_ns;	 /* 0: never spin */
	unsigned spinners;	 /* atomic: workers that spin at this moment ... */
	unsigned max_spinners;	 /* ... and how many may, so that one CPU is left to the driver */
	const int *repairs;	 /* atomic: sigbus_repairs() of whoever maps the memory */
	int notice;		 /* eventfd: one of its queues, or memory below one, broke */
};

/* 0 or a negative errno. `repairs`: see sigbus_repairs(). `cpus`: where each worker runs, -1 for any; NULL:
 * all of them anywhere. One without workers is for queues that another engine's serve. */
int engine_init(struct engine *e, unsigned nworkers, const char *name, const int *repairs,
		const int *cpus);

/* An eventfd that is signalled when a queue broke, memory below one did, or a queue missed a mapping; read
 * by nobody. The queue's owner finds the report then, and tells the driver or its side. */
static inline int engine_notice(const struct engine *e)
{
	return e->notice;
}

/* Everything must be detached. */
void engine_destroy(struct engine *e);

/* The queue as its owner describes it; -1 for a descriptor that there is not. */
struct engine_queue_config {
	struct virtqueue *vq;
	const struct engine_ops *ops;
	int kick, source;
	struct virtqueue_call call;
	const struct engine *owner; /* whose notice tells of it; NULL: of the engine that serves it */
};

/* The worker with the fewest queues, as far as one can say while others attach. */
unsigned engine_idlest(const struct engine *e);

/*
 * Hands the queue to a worker, which looks at it at once. From here to the return of detach the ring
 * belongs to that worker alone. 0 or a negative errno (-EPERM: the kick cannot be waited for; -ESRCH: the
 * engine is another process's, of which this one was forked).
 */
int engine_attach(struct engine *e, unsigned worker, struct engine_queue *q,
		  const struct engine_queue_config *cfg);

/* Takes the queue back once what was popped is published. Harmless if it is not attached. */
void engine_detach(struct engine *e, struct engine_queue *q);

/*
 * Between the two, no queue of the worker that has this one is used, nor anything that they translate with.
 * Cheaper than to detach and attach, above all while the worker sleeps. Any thread may hold, and several at
 * a time; nobody attaches or detaches while he does. Does nothing for a queue that is not attached.
 * `look`: there may be work that no kick tells of.
 */
void engine_hold(struct engine_queue *q);
void engine_release(struct engine_queue *q, bool look);

/* A worker's thread, between its first queue and its last. */
void *engine_worker_main(void *worker);

/* ------------------------------------------------------------------ for those who serve */

uint64_t engine_now_ns(void);

/* Someone waits for the worker: be done with the batch soon. */
static inline bool engine_changes(const struct engine_worker *w)
{
	return __atomic_load_n(&w->changed, __ATOMIC_RELAXED);
}

/* Up to n chains: how many; -1: the queue broke. */
int engine_pop(struct engine_queue *q, struct vhost_chain **batch, unsigned n);

/* Makes visible what was filled, and tells the driver if it wants to know. */
void engine_publish(struct engine_queue *q);

/* The queue broke (vq->report): it is served no more, and its owner is told. */
void engine_fail(struct engine_queue *q);

/* arm and has_work of a queue whose work is what its driver makes available. */
bool engine_arm(struct engine_queue *q);
bool engine_has_work(struct engine_queue *q);

#endif
