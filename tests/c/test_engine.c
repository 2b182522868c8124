/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What an engine's workers do with any kind of queue, shown with one whose work is a counter: wake-ups from a
 * second descriptor, requests in flight that are settled before anybody else has the queue, CPUs. Rings and
 * requests are test_engine_blk.c's.
 */
#define _GNU_SOURCE /* sched_getcpu, gettid */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "barrier.h"
#include "check.h"
#include "engine.h"
#include "eventfd.h"

#define LONG_WAIT_MS 30000

static const int no_repairs;

struct toy {
	struct engine_queue engine;
	struct virtqueue vq;
	int kick, source, served; /* eventfds: never signalled, work comes, work was taken */
	unsigned todo;	    /* atomic */
	unsigned in_flight; /* the worker's, and whoever holds the queue may look */
	unsigned settled;
	bool keeps;	    /* what it takes is in flight until it is settled */
	int cpu;	    /* that it was served on ... */
	pid_t tid;	    /* ... and the thread */
};

static bool toy_has_work(struct engine_queue *q)
{
	return LOAD_ACQUIRE(((struct toy *)q)->todo);
}

static bool toy_serve(struct engine_worker *w, struct engine_queue *q)
{
	struct toy *t = (struct toy *)q;
	unsigned n = __atomic_exchange_n(&t->todo, 0, __ATOMIC_ACQUIRE);

	(void)w;
	if (!n)
		return false;
	t->cpu = sched_getcpu();
	t->tid = gettid();
	if (t->keeps)
		t->in_flight += n;
	q->busy = t->in_flight;
	q->armed = false;
	eventfd_signal(t->served);
	return true;
}

static bool toy_arm(struct engine_queue *q)
{
	return toy_has_work(q);
}

static void toy_settle(struct engine_queue *q)
{
	struct toy *t = (struct toy *)q;

	t->settled += t->in_flight;
	t->in_flight = 0;
	q->busy = false;
}

static const struct engine_ops toy_ops = {
	.serve = toy_serve, .has_work = toy_has_work, .arm = toy_arm, .settle = toy_settle
};

static int an_eventfd(void)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK(fd >= 0);
	return fd;
}

/* With a kick, or the worker would look every now and then without being woken. */
static void toy_attach(struct engine *e, struct toy *t, bool keeps)
{
	struct engine_queue_config cfg = { &t->vq, &toy_ops, an_eventfd(), an_eventfd(), { .fd = -1 }, NULL };

	memset(t, 0, sizeof(*t));
	t->keeps = keeps;
	t->kick = cfg.kick;
	t->source = cfg.source;
	t->served = an_eventfd();
	CHECK_EQ(engine_attach(e, 0, &t->engine, &cfg), 0);
}

static void toy_detach(struct engine *e, struct toy *t)
{
	engine_detach(e, &t->engine);
	close(t->kick);
	close(t->source);
	close(t->served);
}

static void give(struct toy *t, unsigned n)
{
	__atomic_add_fetch(&t->todo, n, __ATOMIC_RELEASE);
	eventfd_signal(t->source);
}

static void wait_served(struct toy *t)
{
	struct pollfd p = { .fd = t->served, .events = POLLIN };
	uint64_t count;

	CHECK_EQ(poll(&p, 1, LONG_WAIT_MS), 1);
	CHECK_EQ(read(t->served, &count, sizeof(count)), sizeof(count));
}

/* The worker sleeps: there is nothing that it could do. */
static void wait_asleep(const struct toy *t)
{
	char path[64], state = 0;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)t->tid);
	while (state != 'S') {
		FILE *f = fopen(path, "r");

		CHECK(f);
		CHECK_EQ(fscanf(f, "%*d %*s %c", &state), 1);
		fclose(f);
	}
}

static void test_source_wakes(void)
{
	struct engine e;
	struct toy t;

	CHECK_EQ(engine_init(&e, 1, "toy", &no_repairs, NULL), 0);
	toy_attach(&e, &t, false);
	for (int i = 0; i < 1000; i++) {
		give(&t, 1);
		wait_served(&t);
		if (i % 2)
			wait_asleep(&t);
	}
	toy_detach(&e, &t);
	engine_destroy(&e);
}

/* Whoever holds a queue, or takes it back, finds nothing in flight, though the worker sleeps with it. */
static void test_settled_first(void)
{
	struct engine e;
	struct toy t;

	CHECK_EQ(engine_init(&e, 1, "toy", &no_repairs, NULL), 0);
	toy_attach(&e, &t, true);
	for (unsigned i = 1; i <= 200; i++) {
		give(&t, 1);
		wait_served(&t);
		if (i % 2)
			wait_asleep(&t);
		engine_hold(&t.engine);
		CHECK_EQ(t.in_flight, 0);
		CHECK_EQ(t.settled, i);
		give(&t, 1);
		CHECK_EQ(LOAD_ACQUIRE(t.todo), 1); /* held: nobody takes it */
		__atomic_store_n(&t.todo, 0, __ATOMIC_RELEASE);
		engine_release(&t.engine, false);
	}
	give(&t, 3);
	wait_served(&t);
	toy_detach(&e, &t);
	CHECK_EQ(t.in_flight, 0);
	CHECK_EQ(t.settled, 203);
	engine_destroy(&e);
}

static void test_where_it_runs(void)
{
	cpu_set_t ours;
	struct engine e;
	struct toy t;

	CHECK_EQ(sched_getaffinity(0, sizeof(ours), &ours), 0);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &ours))
			continue;
		CHECK_EQ(engine_init(&e, 1, "toy", &no_repairs, &cpu), 0);
		toy_attach(&e, &t, false);
		give(&t, 1);
		wait_served(&t);
		CHECK_EQ(t.cpu, cpu);
		toy_detach(&e, &t);
		engine_destroy(&e);
	}
}

/* A CPU that there is not: refused, with nothing left. */
static void test_no_such_cpu(void)
{
	const int cpu = CPU_SETSIZE - 1;
	struct engine_queue_config cfg = { NULL, &toy_ops, -1, -1, { .fd = -1 }, NULL };
	struct engine e;
	struct toy t;

	memset(&t, 0, sizeof(t));
	cfg.vq = &t.vq;
	CHECK_EQ(engine_init(&e, 1, "toy", &no_repairs, &cpu), 0);
	CHECK_EQ(engine_attach(&e, 0, &t.engine, &cfg), -EINVAL);
	engine_detach(&e, &t.engine);
	engine_destroy(&e);
}

int main(void)
{
	RUN(test_source_wakes);
	RUN(test_settled_first);
	RUN(test_where_it_runs);
	RUN(test_no_such_cpu);
	return 0;
}
