/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A worker's life: serve every queue that it has until all are empty, look a little longer if that
 * paid off lately, ask for kicks, look once more, sleep. An idle worker sleeps until an eventfd wakes
 * it; there is no timer.
 *
 * Kicks are waited for edge-triggered and never read: that saves a system call per wake-up, and a peer
 * that shares the eventfd cannot make us block in a read by being faster.
 */
#define _GNU_SOURCE /* pthread_setname_np, sched_getaffinity */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "barrier.h"
#include "engine_blk.h"
#include "eventfd.h"
#include "virtqueue_log.h"

#define SPIN_MAX_NS 32000u
#define SPIN_START_NS 4000u
#define SPIN_LOOKS 32 /* between two looks at the clock */
#define SPIN_FUTILE 8 /* as many in vain, one after the other, and we let it be ... */
#define SPIN_REST 512 /* ... for as many sleeps */

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + ts.tv_nsec;
}

/* ------------------------------------------------------------------ one queue */

static void fault(struct virtqueue *vq, const struct vhost_chain *c, enum virtqueue_fault what)
{
	vq->report.head = c->id;
	vq->report.value = blk_request_missing(c, what, &vq->report.limit);
	STORE_RELEASE(vq->report.fault, what); /* others look for it at any time */
}

static void tell_log(struct blk_queue *q)
{
	if (virtqueue_should_tell_log(q->vq))
		eventfd_signal(q->vq->log->fd);
}

static void publish(struct blk_queue *q)
{
	virtqueue_flush(q->vq);
	if (virtqueue_should_notify(q->vq))
		virtqueue_call(&q->call); /* an error has no one to be told: the peer closed its end */
	tell_log(q);
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

static bool changes(struct blk_worker *w)
{
	return __atomic_load_n(&w->changed, __ATOMIC_RELAXED);
}

/* One batch. True if there was work. */
static bool serve(struct blk_worker *w, struct blk_queue *q)
{
	struct vhost_chain *batch[BLK_BATCH];
	uint64_t since = 0;
	bool slow = q->disk->fd >= 0, ok = true;
	int i, n;

	if (unlikely(q->failed))
		return false;
	for (i = 0; i < (int)BLK_BATCH; i++)
		batch[i] = &w->chains[i];
	n = virtqueue_pop_batch(q->vq, batch, BLK_BATCH);
	if (!n) {
		if (unlikely(q->vq->report.fault) && !q->missed) {
			q->missed = true;
			eventfd_signal(w->engine->notice);
		}
		return false;
	}
	if (q->armed && n > 0) {
		virtqueue_disable_notification(q->vq);
		q->armed = false;
	}
	if (slow && n > 1)
		since = now_ns();
	for (i = 0; i < n && ok; i++) {
		ok = run(q->vq, q->disk, q->writethrough, batch[i]);
		/* Nobody waits for the slowest of a batch: what took its time goes out at once. */
		if (slow && i + 1 < n && now_ns() - since > BLK_PUBLISH_NS) {
			publish(q);
			since = now_ns();
		}
		/* Who takes a queue back waits for the request at hand, not for as much as a guest can
		 * put into a batch: a session's thread has others to serve. The newest goes first. */
		if (unlikely(slow && changes(w)))
			while (n > i + 1)
				virtqueue_unpop(q->vq, batch[--n]);
	}
	publish(q);
	if (unlikely(n < 0 || !ok)) {
		q->failed = true;
		eventfd_signal(w->engine->notice);
		return false;
	}
	return true;
}

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

/* ------------------------------------------------------------------ the worker's thread */

static bool any_work(struct blk_worker *w)
{
	struct blk_queue *q;

	for (q = w->queues; q; q = q->next)
		if (!q->failed && virtqueue_has_work(q->vq))
			return true;
	return changes(w);
}

/*
 * Looks for work for as long as it paid off lately; true if something came. At most max_spinners of the
 * engine's workers do so at a time: with as many of them as CPUs, they would keep the driver from
 * running, whose requests they wait for.
 */
static bool spin(struct blk_worker *w)
{
	struct blk_engine *e = w->engine;
	bool found = false;
	uint64_t until;
	int i;

	if (!w->spin_ns)
		return false;
	if (__atomic_add_fetch(&e->spinners, 1, __ATOMIC_RELAXED) <= e->max_spinners) {
		until = now_ns() + w->spin_ns;
		do {
			for (i = 0; i < SPIN_LOOKS && !(found = any_work(w)); i++)
				cpu_relax();
		} while (!found && now_ns() < until);
	}
	__atomic_sub_fetch(&e->spinners, 1, __ATOMIC_RELAXED);
	if (found)
		w->futile = 0;
	return found;
}

static bool rearm(struct blk_worker *w)
{
	struct blk_queue *q;
	bool pending = false;

	for (q = w->queues; q; q = q->next) {
		if (q->armed || q->failed)
			continue;
		q->armed = true;
		pending |= virtqueue_enable_notification(q->vq);
		tell_log(q);
	}
	return pending;
}

/*
 * What a sleep of that length says about looking before the next one: requests that come within
 * SPIN_MAX_NS are worth looking for, a long sleep says that the device is idle. And where we looked for
 * long and found nothing, yet the kick came soon after we slept, the driver most likely had to wait for
 * our CPU. We cannot see where it may run, so this is found out by trial.
 */
static void learn(struct blk_worker *w, uint64_t slept)
{
	uint32_t max = w->engine->max_spin_ns;

	if (slept > SPIN_MAX_NS) {
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

/* Until nobody wants it any more. Under the lock. */
static void keep_off(struct blk_worker *w)
{
	struct blk_queue *q;

	while (w->hold)
		pthread_cond_wait(&w->handed_over, &w->lock);
	w->parked = false;
	/* What is missed from here on is news; and so is a kick, should nobody have answered. */
	for (q = w->queues; q; q = q->next)
		q->missed = false;
}

/* From here on nothing of a queue is touched. */
static void park(struct blk_worker *w)
{
	pthread_mutex_lock(&w->lock);
	w->parked = true;
	if (w->hold)
		pthread_cond_broadcast(&w->handed_over);
	pthread_mutex_unlock(&w->lock);
}

static void unpark(struct blk_worker *w)
{
	pthread_mutex_lock(&w->lock);
	keep_off(w);
	pthread_mutex_unlock(&w->lock);
}

/* Sleeps until a kick, or a change of the list. */
static void sleep_until_kick(struct blk_worker *w)
{
	struct epoll_event events[8];
	struct blk_queue *q;
	uint64_t start = now_ns(), one;
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
	learn(w, now_ns() - start);
}

/* Takes in and hands back queues, and keeps off them if that is wanted. False when none is left: the thread ends. */
static bool change(struct blk_worker *w)
{
	struct blk_queue **at, *q;
	bool more;

	pthread_mutex_lock(&w->lock);
	__atomic_store_n(&w->changed, false, __ATOMIC_RELAXED);
	for (at = &w->queues; *at; at = &(*at)->next)
		;
	*at = w->incoming;
	w->incoming = NULL;
	for (at = &w->queues; (q = *at);) {
		if (!q->leaving) {
			at = &q->next;
			continue;
		}
		*at = q->next;
		q->gone = true;
	}
	pthread_cond_broadcast(&w->handed_over);
	w->parked = true;
	keep_off(w);
	more = w->queues;
	pthread_mutex_unlock(&w->lock);
	return more;
}

/* A SIGBUS was caught since the last look: whose memory it was, the owners of the queues find out. */
static void look_for_repairs(struct blk_worker *w)
{
	int repairs = LOAD_ACQUIRE(*w->engine->repairs);

	if (likely(repairs == w->repairs))
		return;
	w->repairs = repairs;
	eventfd_signal(w->engine->notice);
}

static void *worker_main(void *arg)
{
	struct blk_worker *w = arg;
	struct blk_queue *q;
	bool busy;

	w->spin_ns = w->futile = w->rest = 0;
	w->repairs = LOAD_ACQUIRE(*w->engine->repairs);
	for (;;) {
		if (changes(w) && !change(w))
			return NULL;
		busy = false;
		for (q = w->queues; q; q = q->next)
			busy |= serve(w, q);
		if (busy || spin(w) || rearm(w))
			continue;
		look_for_repairs(w); /* nobody may kick for a ring whose memory is gone */
		sleep_until_kick(w);
	}
}

/* ------------------------------------------------------------------ control */

static void wake(struct blk_worker *w)
{
	__atomic_store_n(&w->changed, true, __ATOMIC_RELAXED);
	eventfd_signal(w->wake);
}

static int start_thread(struct blk_worker *w)
{
	sigset_t all, old;
	char name[16];
	int rc;

	/* The program's signals are for its own threads. Those that a fault raises stay deliverable. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGFPE);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(&w->thread, NULL, worker_main, w);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return -rc;
	w->running = true;
	snprintf(name, sizeof(name), "%s/%u", w->engine->name,
		 (unsigned)(w - w->engine->workers) % 10000);
	pthread_setname_np(w->thread, name);
	return 0;
}

static int dup_fd(int fd, int *to)
{
	*to = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return fd >= 0 && *to < 0 ? -errno : 0;
}

static void close_fds(struct blk_queue *q)
{
	int *fds[] = { &q->kick, &q->call.fd };
	unsigned i;

	for (i = 0; i < 2; i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

static int open_fds(struct blk_queue *q, const struct blk_queue_config *cfg)
{
	int rc;

	q->call = cfg->call;
	q->kick = q->call.fd = -1;
	rc = dup_fd(cfg->kick, &q->kick);
	if (!rc)
		rc = dup_fd(cfg->call.fd, &q->call.fd);
	if (rc)
		close_fds(q);
	return rc;
}

static int worker_init(struct blk_worker *w, struct blk_engine *e)
{
	struct epoll_event ev = { .events = EPOLLIN };
	unsigned i;

	memset(w, 0, sizeof(*w));
	w->engine = e;
	for (i = 0; i < BLK_BATCH; i++)
		vhost_chain_init(&w->chains[i]);
	w->epoll = epoll_create1(EPOLL_CLOEXEC);
	w->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (w->epoll < 0 || w->wake < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->wake, &ev))
		return -errno;
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->handed_over, NULL);
	return 0;
}

/* The threads are those of the process that made the engine. A fork has copies of what they use, as it was at
 * that moment: held locks, and threads that wait. */
static bool has_threads(const struct blk_engine *e)
{
	return getpid() == e->pid;
}

static void worker_destroy(struct blk_worker *w)
{
	unsigned i;

	for (i = 0; i < BLK_BATCH; i++)
		vhost_chain_destroy(&w->chains[i]);
	if (has_threads(w->engine)) { /* or this would wait for who waits */
		pthread_cond_destroy(&w->handed_over);
		pthread_mutex_destroy(&w->lock);
	}
	if (w->epoll >= 0)
		close(w->epoll);
	if (w->wake >= 0)
		close(w->wake);
}

/* One CPU is left to the driver, which may use those that we may not, too. */
static unsigned cpus_to_spin_on(void)
{
	long online = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned ours = 1;
	cpu_set_t set;

	if (!sched_getaffinity(0, sizeof(set), &set))
		ours = (unsigned)CPU_COUNT(&set);
	if (online < 2)
		return 0;
	return ours < (unsigned)online ? ours : (unsigned)online - 1;
}

int blk_engine_init(struct blk_engine *e, unsigned nworkers, const char *name, const int *repairs)
{
	int rc;

	memset(e, 0, sizeof(*e));
	snprintf(e->name, sizeof(e->name), "%s", name);
	e->max_spinners = cpus_to_spin_on();
	e->max_spin_ns = e->max_spinners ? SPIN_MAX_NS : 0;
	e->repairs = repairs;
	e->pid = getpid();
	e->notice = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (e->notice < 0)
		return -errno;
	pthread_mutex_init(&e->control, NULL);
	e->workers = calloc(nworkers, sizeof(*e->workers));
	if (!e->workers) {
		blk_engine_destroy(e);
		return -ENOMEM;
	}
	for (; e->nworkers < nworkers; e->nworkers++) {
		rc = worker_init(&e->workers[e->nworkers], e);
		if (rc) {
			worker_destroy(&e->workers[e->nworkers]);
			blk_engine_destroy(e);
			return rc;
		}
	}
	return 0;
}

void blk_engine_destroy(struct blk_engine *e)
{
	while (e->nworkers)
		worker_destroy(&e->workers[--e->nworkers]);
	free(e->workers);
	e->workers = NULL;
	close(e->notice);
	pthread_mutex_destroy(&e->control);
}

static int watch_kick(struct blk_worker *w, struct blk_queue *q)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET, .data.ptr = q };

	return q->kick >= 0 && epoll_ctl(w->epoll, EPOLL_CTL_ADD, q->kick, &ev) ? -errno : 0;
}

/* Closing would not take it out of the epoll set: the peer has the same open file. */
static void unwatch_kick(struct blk_worker *w, struct blk_queue *q)
{
	if (q->kick >= 0)
		epoll_ctl(w->epoll, EPOLL_CTL_DEL, q->kick, NULL);
}

int blk_engine_attach(struct blk_engine *e, unsigned worker, struct blk_queue *q,
		      const struct blk_queue_config *cfg)
{
	struct blk_worker *w = &e->workers[worker];
	int rc;

	memset(q, 0, sizeof(*q));
	if (!has_threads(e))
		return -ESRCH;
	q->vq = cfg->vq;
	q->disk = cfg->disk;
	q->writethrough = cfg->writethrough;
	/* Whoever had it before may have been taken off it at work, with notifications off: a queue that
	 * is empty at the first look would then never be kicked for. */
	q->armed = false;
	rc = open_fds(q, cfg);
	if (rc)
		return rc;
	pthread_mutex_lock(&e->control);
	rc = watch_kick(w, q);
	if (!rc) {
		pthread_mutex_lock(&w->lock);
		w->incoming = q;
		pthread_mutex_unlock(&w->lock);
		wake(w);
		if (!w->attached)
			rc = start_thread(w);
		if (rc) {
			w->incoming = NULL;
			unwatch_kick(w, q);
		}
	}
	if (!rc) {
		/* Also of a new thread: `incoming` has room for one, and the next may come soon. */
		pthread_mutex_lock(&w->lock);
		while (w->incoming)
			pthread_cond_wait(&w->handed_over, &w->lock);
		pthread_mutex_unlock(&w->lock);
		w->attached++;
		q->worker = w;
	}
	pthread_mutex_unlock(&e->control);
	if (rc)
		close_fds(q);
	return rc;
}

void blk_engine_detach(struct blk_engine *e, struct blk_queue *q)
{
	struct blk_worker *w = q->worker;

	if (!w)
		return;
	/* In the child of a fork there is no thread to wait for, and the epoll set is the parent's, too. */
	if (!has_threads(e)) {
		close_fds(q);
		q->worker = NULL;
		return;
	}
	pthread_mutex_lock(&e->control);
	pthread_mutex_lock(&w->lock);
	q->leaving = true;
	pthread_mutex_unlock(&w->lock);
	wake(w);
	pthread_mutex_lock(&w->lock);
	while (!q->gone)
		pthread_cond_wait(&w->handed_over, &w->lock);
	pthread_mutex_unlock(&w->lock);
	if (!--w->attached) {
		pthread_join(w->thread, NULL);
		w->running = false;
	}
	unwatch_kick(w, q);
	close_fds(q);
	q->worker = NULL;
	pthread_mutex_unlock(&e->control);
}

void blk_engine_hold(struct blk_queue *q)
{
	struct blk_worker *w = q->worker;

	if (!w || !has_threads(w->engine))
		return;
	pthread_mutex_lock(&w->lock);
	w->hold++;
	if (!w->parked)
		wake(w);
	while (!w->parked)
		pthread_cond_wait(&w->handed_over, &w->lock);
	pthread_mutex_unlock(&w->lock);
}

void blk_engine_release(struct blk_queue *q, bool look)
{
	struct blk_worker *w = q->worker;

	if (!w || !has_threads(w->engine))
		return;
	pthread_mutex_lock(&w->lock);
	if (!--w->hold)
		pthread_cond_broadcast(&w->handed_over);
	pthread_mutex_unlock(&w->lock);
	if (look)
		eventfd_signal(w->wake);
}
