/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Reads, writes and flushes by io_uring: the kernel's own way not to make a worker wait. Knows operations;
 * knows neither rings of queues nor workers. One io_uring has one user, of one thread at a time; it is made
 * when the first operation needs it.
 *
 * Compiled without liburing, or where the kernel forbids it, everything is left to blk_pool.h.
 */
#ifndef VHOST_BLK_URING_H
#define VHOST_BLK_URING_H

#include <stdbool.h>

#include "blk_merge.h"

struct blk_uring;

/* 0: io_uring works in this process; or a negative errno (-EPERM, -ENOSYS ...; -ENOTSUP: built without). */
int blk_uring_probe(void);

/* For `depth` operations at a time; `wake` is an eventfd that is signalled when one came back. NULL: it cannot
 * be had. */
struct blk_uring *blk_uring_new(unsigned depth, int wake);

/* Nothing is out any more, unless this is the child of a fork. NULL is none. */
void blk_uring_free(struct blk_uring *u);

/* Of a list of operations those that the kernel took; the others, which somebody else has to do, are returned
 * as a list. */
struct blk_request *blk_uring_submit(struct blk_uring *u, const struct blk_disk *disk,
				     struct blk_request *list);

/* How many are out. */
unsigned blk_uring_out(const struct blk_uring *u);

/* The next that came back. *rest: there is more to do about it, and somebody else has to. NULL: there is none. */
struct blk_request *blk_uring_reap(struct blk_uring *u, bool *rest);

bool blk_uring_ready(const struct blk_uring *u);

/* Should one that comes back signal the eventfd? As said first, it does. */
void blk_uring_wake(struct blk_uring *u, bool wanted);

/* Until one came back, or for a while where the kernel does not let us wait. One has to be out. */
void blk_uring_wait(struct blk_uring *u);

#endif
