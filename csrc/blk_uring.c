/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#define _GNU_SOURCE /* RWF_DSYNC */
#include "blk_uring.h"

#include <errno.h>
#include <stdlib.h>

#ifdef VHOST_LIBURING
#include <liburing.h>
#include <sys/uio.h>
#include <unistd.h>

#define BLK_URING_LOOK_US 1000

#ifndef UIO_MAXIOV
#define UIO_MAXIOV 1024
#endif

struct blk_uring {
	struct io_uring ring;
	unsigned out;
	bool refused; /* the kernel does not take operations any more */
};

/* 5.6 has all that is used here. */
static int start(struct io_uring *ring, unsigned entries)
{
	int rc = io_uring_queue_init(entries, ring, 0);

	if (rc || ring->features & IORING_FEAT_RW_CUR_POS)
		return rc;
	io_uring_queue_exit(ring);
	return -ENOSYS;
}

/* A sandbox may allow the one system call and forbid the other. */
int blk_uring_probe(void)
{
	struct io_uring_cqe *cqe;
	struct io_uring ring;
	int rc = start(&ring, 1);

	if (rc)
		return rc;
	io_uring_prep_nop(io_uring_get_sqe(&ring));
	rc = io_uring_submit_and_wait(&ring, 1);
	if (rc >= 0)
		rc = io_uring_peek_cqe(&ring, &cqe);
	io_uring_queue_exit(&ring);
	return rc;
}

struct blk_uring *blk_uring_new(unsigned depth, int wake)
{
	struct blk_uring *u = calloc(1, sizeof(*u));

	if (!u)
		return NULL;
	if (start(&u->ring, depth)) {
		free(u);
		return NULL;
	}
	if (io_uring_register_eventfd(&u->ring, wake)) {
		io_uring_queue_exit(&u->ring);
		free(u);
		return NULL;
	}
	return u;
}

void blk_uring_free(struct blk_uring *u)
{
	if (!u)
		return;
	io_uring_queue_exit(&u->ring);
	free(u);
}

static bool can_do(struct blk_request *op)
{
	return op->todo == BLK_FLUSH ||
	       ((op->todo == BLK_READ || op->todo == BLK_WRITE) && blk_op_span(op)->num <= UIO_MAXIOV);
}

static void prepare(struct io_uring_sqe *sqe, const struct blk_disk *disk, struct blk_request *op)
{
	const struct blk_span *s = blk_op_span(op);
	uint64_t at = *blk_op_at(op);

	if (op->todo == BLK_FLUSH)
		io_uring_prep_fsync(sqe, disk->fd, IORING_FSYNC_DATASYNC);
	else if (op->todo == BLK_WRITE)
		io_uring_prep_writev2(sqe, disk->fd, s->iov, s->num, at, op->stable ? RWF_DSYNC : 0);
	else
		io_uring_prep_readv(sqe, disk->fd, s->iov, s->num, at);
	io_uring_sqe_set_data(sqe, op);
}

/* How many of n the kernel took. */
static unsigned enter(struct blk_uring *u, unsigned n)
{
	unsigned done = 0;
	int rc;

	while (done < n) {
		rc = io_uring_submit(&u->ring);
		if (rc > 0)
			done += rc;
		else if (rc != -EINTR)
			break;
	}
	/* What it did not take stays in its queue, and is never offered again. */
	u->refused = done < n;
	u->out += done;
	return done;
}

struct blk_request *blk_uring_submit(struct blk_uring *u, const struct blk_disk *disk,
				     struct blk_request *list)
{
	struct blk_request *op, *next, *taken = NULL, **end = &taken, *rest = NULL, **rest_end = &rest;
	struct io_uring_sqe *sqe;
	unsigned n = 0;

	for (op = list; op; op = next) {
		next = op->next;
		op->next = NULL;
		sqe = !u->refused && can_do(op) ? io_uring_get_sqe(&u->ring) : NULL;
		if (sqe) {
			prepare(sqe, disk, op);
			*end = op;
			end = &op->next;
			n++;
		} else {
			*rest_end = op;
			rest_end = &op->next;
		}
	}
	for (n = n ? enter(u, n) : 0, op = taken; op && n; n--)
		op = op->next;
	*rest_end = op;
	return rest;
}

unsigned blk_uring_out(const struct blk_uring *u)
{
	return u->out;
}

struct blk_request *blk_uring_reap(struct blk_uring *u, bool *rest)
{
	struct io_uring_cqe *cqe;
	struct blk_request *op;
	int res;

	if (!u->out || io_uring_peek_cqe(&u->ring, &cqe))
		return NULL;
	op = io_uring_cqe_get_data(cqe);
	res = cqe->res;
	io_uring_cqe_seen(&u->ring, cqe);
	u->out--;
	*rest = false;
	if (op->todo == BLK_FLUSH)
		blk_request_done(op, res < 0 ? -EIO : 0);
	else if (likely(res >= 0 && (uint32_t)res == blk_op_span(op)->len))
		blk_op_done(op);
	else
		*rest = true; /* who waits for it finds out how it goes on, or whose error it is */
	return op;
}

bool blk_uring_ready(const struct blk_uring *u)
{
	return u->out && io_uring_cq_ready(&u->ring);
}

void blk_uring_wake(struct blk_uring *u, bool wanted)
{
	io_uring_cq_eventfd_toggle(&u->ring, wanted);
}

void blk_uring_wait(struct blk_uring *u)
{
	struct io_uring_cqe *cqe;
	int rc;

	do
		rc = io_uring_wait_cqe(&u->ring, &cqe);
	while (rc == -EINTR);
	/* A sandbox that forbids it from now on does not end what is under way: we look again, but not all the time. */
	if (unlikely(rc))
		usleep(BLK_URING_LOOK_US);
}

#else

int blk_uring_probe(void)
{
	return -ENOTSUP;
}

struct blk_uring *blk_uring_new(unsigned depth, int wake)
{
	(void)depth;
	(void)wake;
	return NULL;
}

void blk_uring_free(struct blk_uring *u)
{
	(void)u;
}

struct blk_request *blk_uring_submit(struct blk_uring *u, const struct blk_disk *disk,
				     struct blk_request *list)
{
	(void)u;
	(void)disk;
	return list;
}

unsigned blk_uring_out(const struct blk_uring *u)
{
	(void)u;
	return 0;
}

struct blk_request *blk_uring_reap(struct blk_uring *u, bool *rest)
{
	(void)u;
	(void)rest;
	return NULL;
}

bool blk_uring_ready(const struct blk_uring *u)
{
	(void)u;
	return false;
}

void blk_uring_wake(struct blk_uring *u, bool wanted)
{
	(void)u;
	(void)wanted;
}

void blk_uring_wait(struct blk_uring *u)
{
	(void)u;
}

#endif
