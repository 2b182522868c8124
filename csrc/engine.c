/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Hands queues to workers and takes them back: what an engine's owner calls, from threads of his own. */
#define _GNU_SOURCE /* sched_getaffinity, pthread_setname_np */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine.h"
#include "engine_thread.h"
#include "eventfd.h"

static void wake(struct engine_worker *w)
{
	__atomic_store_n(&w->changed, true, __ATOMIC_RELAXED);
	eventfd_signal(w->wake);
}

int engine_thread_start(pthread_t *thread, const pthread_attr_t *attr, const char *name,
			void *(*main)(void *), void *arg)
{
	sigset_t all, old;
	int rc;

	/* The program's signals are for its own threads. Those that a fault raises stay deliverable. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGFPE);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(thread, attr, main, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (!rc)
		pthread_setname_np(*thread, name);
	return rc;
}

static int start_thread(struct engine_worker *w)
{
	pthread_attr_t attr;
	cpu_set_t set;
	char name[16];
	int rc = pthread_attr_init(&attr);

	if (rc)
		return -rc;
	if (w->cpu >= 0) {
		CPU_ZERO(&set);
		CPU_SET(w->cpu, &set);
		rc = pthread_attr_setaffinity_np(&attr, sizeof(set), &set);
	}
	snprintf(name, sizeof(name), "%s/%u", w->engine->name,
		 (unsigned)(w - w->engine->workers) % 10000);
	if (!rc)
		rc = engine_thread_start(&w->thread, &attr, name, engine_worker_main, w);
	pthread_attr_destroy(&attr);
	w->running = !rc;
	return -rc;
}

static int dup_fd(int fd, int *to)
{
	*to = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return fd >= 0 && *to < 0 ? -errno : 0;
}

static void close_fds(struct engine_queue *q)
{
	int *fds[] = { &q->kick, &q->source, &q->call.fd };
	unsigned i;

	for (i = 0; i < 3; i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

static int open_fds(struct engine_queue *q, const struct engine_queue_config *cfg)
{
	int rc;

	q->call = cfg->call;
	q->kick = q->source = q->call.fd = -1;
	rc = dup_fd(cfg->kick, &q->kick);
	if (!rc)
		rc = dup_fd(cfg->source, &q->source);
	if (!rc)
		rc = dup_fd(cfg->call.fd, &q->call.fd);
	if (rc)
		close_fds(q);
	return rc;
}

static int worker_init(struct engine_worker *w, struct engine *e, int cpu)
{
	struct epoll_event ev = { .events = EPOLLIN };
	unsigned i;

	memset(w, 0, sizeof(*w));
	w->engine = e;
	w->cpu = cpu;
	for (i = 0; i < ENGINE_BATCH; i++)
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
static bool has_threads(const struct engine *e)
{
	return getpid() == e->pid;
}

static void worker_destroy(struct engine_worker *w)
{
	unsigned i;

	for (i = 0; i < ENGINE_BATCH; i++)
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

int engine_init(struct engine *e, unsigned nworkers, const char *name, const int *repairs,
		const int *cpus)
{
	unsigned i;
	int rc;

	memset(e, 0, sizeof(*e));
	snprintf(e->name, sizeof(e->name), "%s", name);
	e->max_spinners = cpus_to_spin_on();
	e->max_spin_ns = e->max_spinners ? ENGINE_SPIN_MAX_NS : 0;
	e->repairs = repairs;
	e->pid = getpid();
	e->notice = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (e->notice < 0)
		return -errno;
	pthread_mutex_init(&e->control, NULL);
	e->workers = calloc(nworkers ? nworkers : 1, sizeof(*e->workers));
	if (!e->workers) {
		engine_destroy(e);
		return -ENOMEM;
	}
	for (i = 0; i < nworkers; i++) {
		rc = worker_init(&e->workers[i], e, cpus ? cpus[i] : -1);
		if (rc) {
			worker_destroy(&e->workers[i]);
			engine_destroy(e);
			return rc;
		}
		e->nworkers++;
	}
	return 0;
}

void engine_destroy(struct engine *e)
{
	while (e->nworkers)
		worker_destroy(&e->workers[--e->nworkers]);
	free(e->workers);
	e->workers = NULL;
	close(e->notice);
	pthread_mutex_destroy(&e->control);
}

static int watch(struct engine_worker *w, struct engine_queue *q, int fd)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET, .data.ptr = q };

	return fd >= 0 && epoll_ctl(w->epoll, EPOLL_CTL_ADD, fd, &ev) ? -errno : 0;
}

/* Closing would not take it out of the epoll set: others have the same open file. */
static void unwatch(struct engine_worker *w, int fd)
{
	if (fd >= 0)
		epoll_ctl(w->epoll, EPOLL_CTL_DEL, fd, NULL);
}

static int watch_queue(struct engine_worker *w, struct engine_queue *q)
{
	int rc = watch(w, q, q->kick);

	if (rc)
		return rc;
	rc = watch(w, q, q->source);
	if (rc)
		unwatch(w, q->kick);
	return rc;
}

static void unwatch_queue(struct engine_worker *w, struct engine_queue *q)
{
	unwatch(w, q->kick);
	unwatch(w, q->source);
}

unsigned engine_idlest(const struct engine *e)
{
	unsigned i, best = 0, least = UINT32_MAX, queues;

	for (i = 0; i < e->nworkers; i++) {
		queues = __atomic_load_n(&e->workers[i].attached, __ATOMIC_RELAXED);
		if (queues < least) {
			least = queues;
			best = i;
		}
	}
	return best;
}

int engine_attach(struct engine *e, unsigned worker, struct engine_queue *q,
		      const struct engine_queue_config *cfg)
{
	struct engine_worker *w = &e->workers[worker];
	int rc;

	memset(q, 0, sizeof(*q));
	if (!has_threads(e))
		return -ESRCH;
	q->vq = cfg->vq;
	q->ops = cfg->ops;
	q->owner = cfg->owner ? cfg->owner : e;
	/* Whoever had it before may have been taken off it at work, with notifications off: a queue that
	 * is empty at the first look would then never be kicked for. */
	q->armed = false;
	rc = open_fds(q, cfg);
	if (rc)
		return rc;
	pthread_mutex_lock(&e->control);
	rc = watch_queue(w, q);
	if (!rc) {
		pthread_mutex_lock(&w->lock);
		w->incoming = q;
		pthread_mutex_unlock(&w->lock);
		wake(w);
		if (!w->attached)
			rc = start_thread(w);
		if (rc) {
			w->incoming = NULL;
			unwatch_queue(w, q);
		}
	}
	if (!rc) {
		/* Also of a new thread: `incoming` has room for one, and the next may come soon. */
		pthread_mutex_lock(&w->lock);
		while (w->incoming)
			pthread_cond_wait(&w->handed_over, &w->lock);
		pthread_mutex_unlock(&w->lock);
		__atomic_store_n(&w->attached, w->attached + 1, __ATOMIC_RELAXED);
		q->worker = w;
	}
	pthread_mutex_unlock(&e->control);
	if (rc)
		close_fds(q);
	return rc;
}

void engine_detach(struct engine *e, struct engine_queue *q)
{
	struct engine_worker *w = q->worker;

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
	__atomic_store_n(&w->attached, w->attached - 1, __ATOMIC_RELAXED);
	if (!w->attached) {
		pthread_join(w->thread, NULL);
		w->running = false;
	}
	unwatch_queue(w, q);
	close_fds(q);
	q->worker = NULL;
	pthread_mutex_unlock(&e->control);
}

void engine_hold(struct engine_queue *q)
{
	struct engine_worker *w = q->worker;

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

void engine_release(struct engine_queue *q, bool look)
{
	struct engine_worker *w = q->worker;

	if (!w || !has_threads(w->engine))
		return;
	pthread_mutex_lock(&w->lock);
	if (!--w->hold)
		pthread_cond_broadcast(&w->handed_over);
	pthread_mutex_unlock(&w->lock);
	if (look)
		eventfd_signal(w->wake);
}
