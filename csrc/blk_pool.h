/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Threads that do what would make a worker wait, where the kernel does not do it by itself (blk_uring.h). Knows
 * operations, and to whom they go back; knows neither rings nor workers.
 *
 * There is a thread for each operation that is waited for at a time, up to BLK_POOL_THREADS; they end with the
 * last user.
 */
#ifndef VHOST_BLK_POOL_H
#define VHOST_BLK_POOL_H

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#include "blk_merge.h"

#define BLK_POOL_THREADS 16u

struct blk_pool {
	pthread_mutex_t control; /* of `users`, and of the threads' end */
	unsigned users;
	pthread_mutex_t lock; /* of all that follows */
	pthread_cond_t work, done;
	struct blk_request *first, **end; /* waiting for a thread ... */
	unsigned waiting;		  /* ... how many */
	unsigned threads, idle;
	bool ending;
	pid_t pid; /* of the process that has the threads */
	char name[10];
	pthread_t thread[BLK_POOL_THREADS];
};

/* Who uses a pool. Its operations are those of one thread at a time. */
struct blk_pool_user {
	struct blk_pool *pool;
	const struct blk_disk *disk;
	int wake;		  /* eventfd that is signalled when something came back */
	struct blk_request *done; /* atomic: came back, and was not looked at yet */
	unsigned out;		  /* operations, his own count */
};

/* Nobody may use it any more when it is destroyed. */
void blk_pool_init(struct blk_pool *p, const char *name);
void blk_pool_destroy(struct blk_pool *p);

void blk_pool_enter(struct blk_pool_user *u, struct blk_pool *p, const struct blk_disk *disk, int wake);

/* Nothing of his is out any more, unless this is the child of a fork. The last one waits for the threads. */
void blk_pool_leave(struct blk_pool_user *u);

/* Hands over an operation. Cannot fail: without any thread, it is done here and now. */
void blk_pool_submit(struct blk_pool_user *u, struct blk_request *op);

/* What came back, as a list. NULL: nothing did. */
struct blk_request *blk_pool_reap(struct blk_pool_user *u);

static inline bool blk_pool_ready(const struct blk_pool_user *u)
{
	return LOAD_ACQUIRE(u->done); /* pairs with the release of the thread that did it */
}

/* Until something came back. Something has to be out. */
void blk_pool_wait(struct blk_pool_user *u);

#endif
