/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A worker's life: serve every queue that it has until all are empty, look a little longer if that
 * paid off lately, ask for kicks, look once more, sleep. An idle worker sleeps until an eventfd wakes
 * it; there is no timer.
 *
 * Kicks are waited for edge-triggered and never read: that saves a system call per wake-up, and a peer
 * that shares the eventfd cannot make us block in a read by being faster.
 */
#include <errno.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "barrier.h"
#include "engine.h"
#include "eventfd.h"
#include "virtqueue_log.h"

#define SPIN_START_NS 4000u
#define SPIN_LOOKS 32 /* between two looks at the clock */
#define SPIN_FUTILE 8 /* as many in vain, one after the other, and we let it be ... */
#define SPIN_REST 512 /* ... for as many sleeps */

uint64_t engine_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + ts.tv_nsec;
}

/* ------------------------------------------------------------------ one queue */

static void tell_log(struct engine_queue *q)
{
	if (virtqueue_should_tell_log(q->vq))
		eventfd_signal(q->vq->log->fd);
}

static void tell_owner(struct engine_queue *q)
{
	eventfd_signal(engine_notice(q->owner));
}

void engine_publish(struct engine_queue *q)
{
	virtqueue_flush(q->vq);
	if (virtqueue_should_notify(q->vq))
		virtqueue_call(&q->call); /* an error has no one to be told: the peer closed its end */
	tell_log(q);
}

int engine_pop(struct engine_queue *q, struct vhost_chain **batch, unsigned n)
{
	int got = virtqueue_pop_batch(q->vq, batch, n);

	if (!got && unlikely(q->vq->report.fault) && !q->missed) {
		q->missed = true;
		tell_owner(q);
	}
	if (q->armed && got > 0) {
		virtqueue_disable_notification(q->vq);
		q->armed = false;
	}
	return got;
}

void engine_fail(struct engine_queue *q)
{
	q->failed = true;
	tell_owner(q);
}

bool engine_arm(struct engine_queue *q)
{
	return virtqueue_enable_notification(q->vq);
}

bool engine_has_work(struct engine_queue *q)
{
	return virtqueue_has_work(q->vq);
}

/* ------------------------------------------------------------------ the worker's thread */

static bool any_work(struct engine_worker *w)
{
	struct engine_queue *q;

	for (q = w->queues; q; q = q->next)
		if (!q->failed && q->ops->has_work(q))
			return true;
	return engine_changes(w);
}

/*
 * Looks for work for as long as it paid off lately; true if something came. At most max_spinners of the
 * engine's workers do so at a time: with as many of them as CPUs, they would keep the driver from
 * running, whose requests they wait for.
 */
static bool spin(struct engine_worker *w)
{
	struct engine *e = w->engine;
	bool found = false;
	uint64_t until;
	int i;

	if (!w->spin_ns)
		return false;
	if (__atomic_add_fetch(&e->spinners, 1, __ATOMIC_RELAXED) <= e->max_spinners) {
		until = engine_now_ns() + w->spin_ns;
		do {
			for (i = 0; i < SPIN_LOOKS && !(found = any_work(w)); i++)
				cpu_relax();
		} while (!found && engine_now_ns() < until);
	}
	__atomic_sub_fetch(&e->spinners, 1, __ATOMIC_RELAXED);
	if (found)
		w->futile = 0;
	return found;
}

static bool rearm(struct engine_worker *w)
{
	struct engine_queue *q;
	bool pending = false;

	for (q = w->queues; q; q = q->next) {
		if (q->armed || q->failed)
			continue;
		q->armed = true;
		pending |= q->ops->arm(q);
		tell_log(q);
	}
	return pending;
}

/*
 * What a sleep of that length says about looking before the next one: requests that come within
 * ENGINE_SPIN_MAX_NS are worth looking for, a long sleep says that the device is idle. And where we looked for
 * long and found nothing, yet the kick came soon after we slept, the driver most likely had to wait for
 * our CPU. We cannot see where it may run, so this is found out by trial.
 */
static void learn(struct engine_worker *w, uint64_t slept)
{
	uint32_t max = w->engine->max_spin_ns;

	if (slept > ENGINE_SPIN_MAX_NS) {
		w->spin_ns = 0;
	} else if (w->rest) {
		w->rest--;
	} else if (w->spin_ns < max) {
		w->spin_ns = w->spin_ns ? w->spin_ns * 2 : SPIN_START_NS;
	} else if (max && ++w->futile >= SPIN_FUTILE) {
		w->futile = 0;
		w->spin_ns = 0;
		w->rest = SPIN_REST;
	}
}

static void settle(struct engine_queue *q)
{
	if (q->ops->settle)
		q->ops->settle(q);
}

/* Until nobody wants it any more. Under the lock. */
static void keep_off(struct engine_worker *w)
{
	struct engine_queue *q;

	if (w->hold) {
		/* Had we slept, nothing was in flight, and they are somebody else's already. */
		for (q = w->parked ? NULL : w->queues; q; q = q->next)
			settle(q);
		w->parked = true;
		pthread_cond_broadcast(&w->handed_over);
		while (w->hold)
			pthread_cond_wait(&w->handed_over, &w->lock);
	}
	w->parked = false;
	/* What is missed from here on is news; and so is a kick, should nobody have answered. */
	for (q = w->queues; q; q = q->next)
		q->missed = false;
}

/* From here on nothing of a queue is touched, unless something is in flight. */
static void park(struct engine_worker *w)
{
	struct engine_queue *q;
	bool busy = false;

	for (q = w->queues; q; q = q->next)
		busy |= q->busy;
	pthread_mutex_lock(&w->lock);
	w->parked = !busy;
	if (w->hold)
		pthread_cond_broadcast(&w->handed_over);
	pthread_mutex_unlock(&w->lock);
}

static void unpark(struct engine_worker *w)
{
	pthread_mutex_lock(&w->lock);
	keep_off(w);
	pthread_mutex_unlock(&w->lock);
}

/* Sleeps until a kick, or a change of the list. */
static void sleep_until_kick(struct engine_worker *w)
{
	struct epoll_event events[8];
	struct engine_queue *q;
	uint64_t start = engine_now_ns(), one;
	int timeout = -1, i, n;

	/* A ring without a kick descriptor has to be looked at (SET_VRING_KICK, "polling"). */
	for (q = w->queues; q; q = q->next)
		if (q->kick < 0 && !q->failed)
			timeout = 1;
	park(w);
	n = epoll_wait(w->epoll, events, 8, timeout);
	unpark(w);
	for (i = 0; i < n; i++)
		if (!events[i].data.ptr && read(w->wake, &one, sizeof(one)) < 0 && errno != EAGAIN)
			continue; /* `wake` is ours and an eventfd: cannot happen */
	learn(w, engine_now_ns() - start);
}

/* Takes in and hands back queues, and keeps off them if that is wanted. False when none is left: the thread ends. */
static bool change(struct engine_worker *w)
{
	struct engine_queue **at, *q;
	bool more;

	pthread_mutex_lock(&w->lock);
	__atomic_store_n(&w->changed, false, __ATOMIC_RELAXED);
	for (at = &w->queues; *at; at = &(*at)->next)
		;
	*at = w->incoming;
	if (w->incoming && w->incoming->ops->begin)
		w->incoming->ops->begin(w->incoming);
	w->incoming = NULL;
	for (at = &w->queues; (q = *at);) {
		if (!q->leaving) {
			at = &q->next;
			continue;
		}
		settle(q);
		*at = q->next;
		q->gone = true;
	}
	pthread_cond_broadcast(&w->handed_over);
	keep_off(w);
	more = w->queues;
	pthread_mutex_unlock(&w->lock);
	return more;
}

/* A SIGBUS was caught since the last look: whose memory it was, the owners of the queues find out. */
static void look_for_repairs(struct engine_worker *w)
{
	struct engine_queue *q;
	int repairs = LOAD_ACQUIRE(*w->engine->repairs);

	if (likely(repairs == w->repairs))
		return;
	w->repairs = repairs;
	for (q = w->queues; q; q = q->next)
		tell_owner(q);
}

void *engine_worker_main(void *arg)
{
	struct engine_worker *w = arg;
	struct engine_queue *q;
	bool busy;

	w->spin_ns = w->futile = w->rest = 0;
	w->repairs = LOAD_ACQUIRE(*w->engine->repairs);
	for (;;) {
		if (engine_changes(w) && !change(w))
			return NULL;
		busy = false;
		for (q = w->queues; q; q = q->next)
			busy |= !q->failed && q->ops->serve(w, q);
		if (busy || spin(w) || rearm(w))
			continue;
		look_for_repairs(w); /* nobody may kick for a ring whose memory is gone */
		sleep_until_kick(w);
	}
}
