/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#include "blk_pool.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "engine_thread.h"
#include "eventfd.h"

/* Under the lock all of it, for who has got his last operation back may leave, and free what is used here. */
static void give_back(struct blk_pool_user *u, struct blk_request *op)
{
	bool first = !u->done;

	op->next = u->done;
	STORE_RELEASE(u->done, op); /* pairs with blk_pool_ready */
	if (first)
		eventfd_signal(u->wake);
	pthread_cond_broadcast(&u->pool->done);
}

static struct blk_request *next_op(struct blk_pool *p)
{
	struct blk_request *op = p->first;

	p->first = op->next;
	if (!p->first)
		p->end = &p->first;
	p->waiting--;
	return op;
}

static void *pool_main(void *arg)
{
	struct blk_pool *p = arg;
	struct blk_request *op;

	pthread_mutex_lock(&p->lock);
	for (;;) {
		p->idle++;
		while (!p->first && !p->ending)
			pthread_cond_wait(&p->work, &p->lock);
		p->idle--;
		if (!p->first)
			break;
		op = next_op(p);
		pthread_mutex_unlock(&p->lock);
		blk_op_run(op->owner->disk, op);
		pthread_mutex_lock(&p->lock);
		give_back(op->owner, op);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* One more thread, if that is possible. Under the lock. */
static void grow(struct blk_pool *p)
{
	char name[16];

	snprintf(name, sizeof(name), "%s+%u", p->name, p->threads);
	if (!engine_thread_start(&p->thread[p->threads], NULL, name, pool_main, p))
		p->threads++;
}

void blk_pool_init(struct blk_pool *p, const char *name)
{
	memset(p, 0, sizeof(*p));
	pthread_mutex_init(&p->control, NULL);
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->work, NULL);
	pthread_cond_init(&p->done, NULL);
	p->end = &p->first;
	p->pid = getpid();
	snprintf(p->name, sizeof(p->name), "%s", name);
}

/* A fork has none of the threads, and a copy of their locks as they were at that moment. */
static bool has_threads(const struct blk_pool *p)
{
	return getpid() == p->pid;
}

void blk_pool_destroy(struct blk_pool *p)
{
	if (!has_threads(p))
		return;
	pthread_cond_destroy(&p->done);
	pthread_cond_destroy(&p->work);
	pthread_mutex_destroy(&p->lock);
	pthread_mutex_destroy(&p->control);
}

void blk_pool_enter(struct blk_pool_user *u, struct blk_pool *p, const struct blk_disk *disk, int wake)
{
	*u = (struct blk_pool_user){ .pool = p, .disk = disk, .wake = wake };
	if (!has_threads(p))
		return;
	pthread_mutex_lock(&p->control);
	p->users++;
	pthread_mutex_unlock(&p->control);
}

static void end_threads(struct blk_pool *p)
{
	pthread_mutex_lock(&p->lock);
	p->ending = true;
	pthread_cond_broadcast(&p->work);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->threads; i++)
		pthread_join(p->thread[i], NULL);
	p->threads = 0;
	p->ending = false;
}

void blk_pool_leave(struct blk_pool_user *u)
{
	struct blk_pool *p = u->pool;

	if (!has_threads(p))
		return;
	/* Whoever enters meanwhile finds no threads yet, rather than some that end. */
	pthread_mutex_lock(&p->control);
	if (!--p->users)
		end_threads(p);
	pthread_mutex_unlock(&p->control);
}

void blk_pool_submit(struct blk_pool_user *u, struct blk_request *op)
{
	struct blk_pool *p = u->pool;
	bool alone;

	op->owner = u;
	op->next = NULL;
	u->out++;
	pthread_mutex_lock(&p->lock);
	if (p->waiting >= p->idle && p->threads < BLK_POOL_THREADS)
		grow(p);
	alone = !p->threads;
	if (!alone) {
		*p->end = op;
		p->end = &op->next;
		p->waiting++;
		pthread_cond_signal(&p->work);
	}
	pthread_mutex_unlock(&p->lock);
	if (!alone)
		return;
	blk_op_run(u->disk, op);
	pthread_mutex_lock(&p->lock);
	give_back(u, op);
	pthread_mutex_unlock(&p->lock);
}

struct blk_request *blk_pool_reap(struct blk_pool_user *u)
{
	struct blk_request *list, *op;

	if (likely(!u->out) || !blk_pool_ready(u))
		return NULL;
	pthread_mutex_lock(&u->pool->lock);
	list = u->done;
	u->done = NULL;
	pthread_mutex_unlock(&u->pool->lock);
	for (op = list; op; op = op->next)
		u->out--;
	return list;
}

void blk_pool_wait(struct blk_pool_user *u)
{
	pthread_mutex_lock(&u->pool->lock);
	while (!u->done)
		pthread_cond_wait(&u->pool->done, &u->pool->lock);
	pthread_mutex_unlock(&u->pool->lock);
}
