/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The block engine's threads against drivers in threads of their own: each driver writes blocks that
 * only it uses, reads them back and compares, and sleeps whenever the rules allow it, so that a kick or
 * call that is lost shows as a driver which waits for ever. Meanwhile the rings are taken from the
 * engine and given back.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "engine_blk.h"
#include "iotlb.h"

#ifdef __SANITIZE_THREAD__
#define REQUESTS 1500u
#define HANDOVERS 150u
#else
#define REQUESTS 10000u
#define HANDOVERS 1000u
#endif

#define NUM 64u
#define DEPTH 16u
#define QUEUES 4u
#define BLOCK 1024u
#define SLOT (64 + BLOCK)
#define GUEST 0x100000000ull
#define LONG_WAIT_MS 30000

static const int no_repairs;

struct lane { /* a ring, its driver and what it needs */
	struct driver_queue dq;
	struct virtqueue vq;
	struct blk_queue bq;
	int kick, call;
	uint8_t *mem; /* DEPTH slots: header, status, data */
	uint64_t guest;
	unsigned index;
	unsigned depth;	 /* requests at a time ... */
	unsigned pauses; /* ... and one burst out of so many ends with a pause */
	pthread_t thread;
	uint64_t sleeps;
};

struct world {
	struct guest_memory mem;
	struct iotlb tlb; /* of guest addresses, if `iommu` */
	bool iommu;
	uint8_t *host;
	size_t size;
	struct blk_disk disk;
	struct blk_pool pool;
	struct engine engine;
	struct lane lanes[QUEUES];
};

#define AREA 8192u
#define LANE (3 * AREA + ((DEPTH * SLOT + 4095u) & ~4095u))

static void world_init_behind(struct world *w, bool iommu, bool packed, bool event_idx, unsigned workers,
			      enum blk_aio aio)
{
	struct guest_region region;
	uint32_t bad;

	memset(w, 0, sizeof(*w));
	w->iommu = iommu;
	w->size = QUEUES * LANE;
	w->host = mmap(NULL, w->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(w->host != MAP_FAILED);
	region = (struct guest_region){ GUEST, GUEST, w->size, w->host };
	CHECK_EQ(guest_memory_init(&w->mem, &region, 1, &bad), 0);
	if (iommu)
		CHECK_EQ(iotlb_init(&w->tlb, &w->mem), 0);
	w->disk.fd = memfd_create("disk", MFD_CLOEXEC);
	CHECK(w->disk.fd >= 0);
	w->disk.capacity = QUEUES * DEPTH * BLOCK / 512;
	CHECK_EQ(ftruncate(w->disk.fd, w->disk.capacity * 512), 0);
	/* Nothing is done at once, so that all of it goes the long way, where there is one. */
	w->disk.pace = BLK_WAITS;
	blk_pool_init(&w->pool, "engine");
	CHECK_EQ(engine_init(&w->engine, workers, "engine", &no_repairs, NULL), 0);
	for (unsigned i = 0; i < QUEUES; i++) {
		struct lane *l = &w->lanes[i];
		uint8_t *at = w->host + i * LANE;
		struct virtqueue_areas areas = { at, at + AREA, at + 2 * AREA };
		uint32_t base = packed ? 0x80008000 : 0;
		struct driver_config driver = { .areas = areas, .num = NUM, .base = base,
						.packed = packed, .event_idx = event_idx };
		struct virtqueue_config device = { .areas = areas,
						   .mem = iommu ? &w->tlb.view : &w->mem,
						   .iotlb = iommu ? &w->tlb : NULL, .num = NUM,
						   .base = base, .packed = packed,
						   .indirect = true, .event_idx = event_idx };

		l->index = i;
		l->depth = DEPTH;
		l->pauses = 4;
		l->mem = at + 3 * AREA;
		l->guest = GUEST + (l->mem - w->host);
		l->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		l->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		CHECK(l->kick >= 0 && l->call >= 0);
		CHECK_EQ(driver_queue_init(&l->dq, &driver), 0);
		CHECK_EQ(virtqueue_init(&l->vq, &device), 0);
		CHECK_EQ(blk_queue_init(&l->bq, &w->disk, aio, &w->pool, false), 0);
	}
}

static void world_init(struct world *w, bool packed, bool event_idx, unsigned workers, enum blk_aio aio)
{
	world_init_behind(w, false, packed, event_idx, workers, aio);
}

static void world_destroy(struct world *w)
{
	for (unsigned i = 0; i < QUEUES; i++) {
		struct lane *l = &w->lanes[i];

		blk_queue_destroy(&l->bq);
		driver_queue_destroy(&l->dq);
		virtqueue_destroy(&l->vq);
		close(l->kick);
		close(l->call);
	}
	blk_pool_destroy(&w->pool);
	engine_destroy(&w->engine);
	if (w->iommu)
		iotlb_destroy(&w->tlb);
	guest_memory_destroy(&w->mem);
	close(w->disk.fd);
	munmap(w->host, w->size);
}

static void attach_with(struct world *w, unsigned i, int kick)
{
	struct lane *l = &w->lanes[i];
	struct engine_queue_config cfg = { &l->vq, &blk_engine_ops, kick, l->bq.wake, { .fd = l->call }, NULL };

	CHECK_EQ(engine_attach(&w->engine, i % w->engine.nworkers, &l->bq.engine, &cfg), 0);
}

static void attach(struct world *w, unsigned i)
{
	attach_with(w, i, w->lanes[i].kick);
}

static void detach(struct world *w, unsigned i)
{
	engine_detach(&w->engine, &w->lanes[i].bq.engine);
	CHECK_EQ(w->lanes[i].vq.inuse, 0); /* what was popped is published */
}

static unsigned open_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	unsigned n = 0;

	CHECK(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* ------------------------------------------------------------------ the driver */

static uint32_t rnd(uint64_t *state, uint32_t below)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 33) % below;
}

static void ring(int fd)
{
	uint64_t one = 1;

	CHECK_EQ(write(fd, &one, sizeof(one)), sizeof(one));
}

static void fill_block(uint8_t *data, unsigned lane, uint64_t seq)
{
	for (unsigned i = 0; i < BLOCK; i++)
		data[i] = (uint8_t)(seq * 31 + lane * 7 + i + (i >> 8));
}

/* A slot's request: its block is written, then read, in turn. */
static void submit(struct lane *l, unsigned slot, uint64_t seq)
{
	uint8_t *at = l->mem + slot * SLOT;
	uint64_t guest = l->guest + slot * SLOT;
	bool write = !(seq & 1);
	struct blk_req_header header = { write ? BLK_T_OUT : BLK_T_IN, 0,
					 (l->index * DEPTH + slot) * (BLOCK / 512) };
	struct virtqueue_buf bufs[3] = {
		{ guest, sizeof(header) }, { guest + 64, BLOCK }, { guest + 32, 1 }
	};

	memcpy(at, &header, sizeof(header));
	at[32] = 0xEE;
	if (write)
		fill_block(at + 64, l->index, seq);
	else
		memset(at + 64, 0, BLOCK);
	CHECK(virtqueue_add(&l->dq, bufs, write ? 2 : 1, write ? 1 : 2, slot) >= 0);
}

static void check_answer(struct lane *l, unsigned slot, uint64_t seq, uint32_t written)
{
	uint8_t *at = l->mem + slot * SLOT, want[BLOCK];

	CHECK_EQ(at[32], BLK_S_OK);
	CHECK_EQ(written, seq & 1 ? BLOCK + 1 : 1);
	if (seq & 1) {
		fill_block(want, l->index, seq - 1);
		CHECK(!memcmp(at + 64, want, BLOCK));
	}
}

static void sleep_until_call(struct lane *l)
{
	struct pollfd p = { .fd = l->call, .events = POLLIN };
	uint64_t count;

	l->sleeps++;
	if (poll(&p, 1, LONG_WAIT_MS) != 1) {
		fprintf(stderr, "[%s] queue %u waits in vain: %s\n", check_context, l->index,
			virtqueue_more_used(&l->dq) ? "was not called" : "was not served");
		exit(1);
	}
	CHECK(read(l->call, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
}

/* Pauses of the length that the engine's looking is about, in between bursts. */
static void *drive(void *arg)
{
	struct lane *l = arg;
	uint64_t seq[DEPTH] = { 0 }, state = 88172645463325252ull + l->index, token;
	bool busy[DEPTH] = { false };
	unsigned sent = 0, done = 0, out = 0, burst, slot;
	uint32_t written;
	int rc;

	while (done < REQUESTS) {
		for (burst = 1 + rnd(&state, l->depth); burst && sent < REQUESTS && out < l->depth; burst--) {
			for (slot = rnd(&state, DEPTH); busy[slot]; slot = (slot + 1) % DEPTH)
				;
			submit(l, slot, seq[slot]);
			busy[slot] = true;
			sent++;
			out++;
			if (!rnd(&state, 3) && virtqueue_kick_prepare(&l->dq))
				ring(l->kick);
		}
		if (virtqueue_kick_prepare(&l->dq))
			ring(l->kick);
		while (!(rc = virtqueue_get_buf(&l->dq, &token, &written)) && out) {
			if (!virtqueue_enable_cb(&l->dq))
				sleep_until_call(l);
			if (rnd(&state, 2))
				virtqueue_disable_cb(&l->dq);
		}
		CHECK(rc >= 0);
		for (; rc > 0; rc = virtqueue_get_buf(&l->dq, &token, &written)) {
			check_answer(l, token, seq[token], written);
			seq[token]++;
			busy[token] = false;
			out--;
			done++;
		}
		CHECK_EQ(rc, 0);
		for (unsigned n = rnd(&state, l->pauses) ? 0 : rnd(&state, 3000); n; n--)
			cpu_relax();
	}
	CHECK_EQ(out, 0);
	return NULL;
}

static void start_drivers(struct world *w, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		CHECK_EQ(pthread_create(&w->lanes[i].thread, NULL, drive, &w->lanes[i]), 0);
}

static void join_drivers(struct world *w, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		pthread_join(w->lanes[i].thread, NULL);
}

/* ------------------------------------------------------------------ tests */

static const struct {
	bool packed, event_idx;
	unsigned workers;
	enum blk_aio aio;
	const char *name;
} setups[] = {
	{ false, false, 1, BLK_AIO_SYNC, "split, 1 worker" },
	{ false, true, 1, BLK_AIO_URING, "split, event_idx, 1 worker, io_uring" },
	{ false, true, 3, BLK_AIO_SYNC, "split, event_idx, 3 workers" },
	{ false, false, 2, BLK_AIO_THREADS, "split, 2 workers, threads" },
	{ true, false, 1, BLK_AIO_URING, "packed, 1 worker, io_uring" },
	{ true, true, 1, BLK_AIO_THREADS, "packed, event_idx, 1 worker, threads" },
	{ true, true, 2, BLK_AIO_SYNC, "packed, event_idx, 2 workers" },
};

#define FOR_EACH_SETUP(s)                                                                          \
	for (unsigned s = 0; s < sizeof(setups) / sizeof(setups[0]); s++)                          \
		if ((check_context = setups[s].name))

static void test_several_queues(void)
{
	struct world w;

	FOR_EACH_SETUP(s) {
		world_init(&w, setups[s].packed, setups[s].event_idx, setups[s].workers,
			   setups[s].aio);
		for (unsigned i = 0; i < QUEUES; i++)
			attach(&w, i);
		start_drivers(&w, QUEUES);
		join_drivers(&w, QUEUES);
		for (unsigned i = 0; i < QUEUES; i++)
			detach(&w, i);
		world_destroy(&w);
	}
}

/*
 * One driver with a worker of its own: nobody else wakes that worker by accident. Of one request at a
 * time, each may be the one that comes between the worker's last look and its sleep.
 */
static void test_spinning_and_sleeping(void)
{
	struct world w;

	FOR_EACH_SETUP(s) {
		world_init(&w, setups[s].packed, setups[s].event_idx, 1, setups[s].aio);
		w.lanes[0].depth = 1;
		w.lanes[0].pauses = 1;
		attach(&w, 0);
		start_drivers(&w, 1);
		join_drivers(&w, 1);
		CHECK(w.lanes[0].sleeps > 0);
		detach(&w, 0);
		world_destroy(&w);
	}
}

static void test_taken_away_under_load(void)
{
	uint64_t state = 362436069;
	bool there[QUEUES];
	struct world w;
	unsigned i;

	FOR_EACH_SETUP(s) {
		world_init(&w, setups[s].packed, setups[s].event_idx, setups[s].workers,
			   setups[s].aio);
		memset(there, 0, sizeof(there));
		start_drivers(&w, QUEUES);
		for (unsigned n = 0; n < HANDOVERS; n++) {
			i = rnd(&state, QUEUES);
			if (there[i])
				detach(&w, i);
			else
				attach(&w, i);
			there[i] = !there[i];
		}
		for (i = 0; i < QUEUES; i++)
			if (!there[i])
				attach(&w, i);
		join_drivers(&w, QUEUES);
		for (i = 0; i < QUEUES; i++)
			detach(&w, i);
		world_destroy(&w);
	}
}

/* The second comes while the first one's thread has only just begun. */
static void test_attached_at_once(void)
{
	struct world w;
	unsigned fds;

	check_context = "";
	world_init(&w, false, true, 1, BLK_AIO_URING);
	fds = open_fds();
	for (unsigned n = 0; n < HANDOVERS; n++) {
		for (unsigned i = 0; i < QUEUES; i++)
			attach(&w, i);
		for (unsigned i = 0; i < QUEUES; i++)
			detach(&w, (i + n) % QUEUES);
		CHECK(!w.engine.workers[0].running);
	}
	CHECK_EQ(open_fds(), fds);
	world_destroy(&w);
}

static void test_without_a_kick(void)
{
	struct world w;

	world_init(&w, true, true, 1, BLK_AIO_URING);
	attach_with(&w, 0, -1);
	attach(&w, 1);
	start_drivers(&w, 2);
	join_drivers(&w, 2);
	detach(&w, 0);
	detach(&w, 1);
	world_destroy(&w);
}

static void test_refused(void)
{
	struct world w;
	struct engine_queue_config cfg;
	unsigned fds;

	world_init(&w, false, false, 1, BLK_AIO_URING);
	cfg = (struct engine_queue_config){ &w.lanes[0].vq, &blk_engine_ops, w.disk.fd, -1, { .fd = -1 }, NULL };
	fds = open_fds();
	CHECK_EQ(engine_attach(&w.engine, 0, &w.lanes[0].bq.engine, &cfg), -EPERM);
	CHECK_EQ(open_fds(), fds);
	cfg.kick = 1 << 20;
	CHECK_EQ(engine_attach(&w.engine, 0, &w.lanes[0].bq.engine, &cfg), -EBADF);
	CHECK_EQ(open_fds(), fds);
	engine_detach(&w.engine, &w.lanes[0].bq.engine);
	attach(&w, 0);
	start_drivers(&w, 1);
	join_drivers(&w, 1);
	detach(&w, 0);
	world_destroy(&w);
}

/* No status: that ring ends, the owner is told, and the ring beside it goes on. */
static void test_broken(void)
{
	struct world w;
	struct lane *l = &w.lanes[1];
	struct virtqueue_buf buf;
	struct pollfd p;

	world_init(&w, false, true, 1, BLK_AIO_URING);
	attach(&w, 0);
	attach(&w, 1);
	start_drivers(&w, 1);
	p = (struct pollfd){ .fd = engine_notice(&w.engine), .events = POLLIN };
	CHECK_EQ(poll(&p, 1, 0), 0);
	buf = (struct virtqueue_buf){ l->guest, 16 };
	CHECK(virtqueue_add(&l->dq, &buf, 1, 0, 0) >= 0);
	CHECK(virtqueue_kick_prepare(&l->dq));
	ring(l->kick);
	CHECK_EQ(poll(&p, 1, LONG_WAIT_MS), 1);
	CHECK_EQ(LOAD_ACQUIRE(l->vq.report.fault), VQ_REQUEST_STATUS);
	CHECK_EQ(l->vq.report.limit, 1);
	join_drivers(&w, 1);
	detach(&w, 0);
	engine_detach(&w.engine, &l->bq.engine);
	world_destroy(&w);
}

/* ------------------------------------------------------------------ a fork */

/* Until the worker waits for us to release it. glibc counts who waits from the fourth bit on. */
static void wait_until_held(struct engine_worker *w)
{
	while (!(__atomic_load_n(&w->handed_over.__data.__wrefs, __ATOMIC_RELAXED) >> 3))
		sched_yield();
}

/* A child has none of the threads: it cannot have a queue served, but it can let go of everything, whatever
 * the threads were doing at that moment. */
static void test_a_fork(void)
{
	struct world w;
	struct engine_queue_config cfg;
	struct engine_queue other;
	pid_t child;
	int status;

	world_init(&w, false, false, 1, BLK_AIO_URING);
	attach(&w, 0);
	engine_hold(&w.lanes[0].bq.engine);
	ring(w.lanes[0].kick); /* so that it wakes up, and finds itself held */
	wait_until_held(&w.engine.workers[0]);
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		alarm(20);
		cfg = (struct engine_queue_config){ &w.lanes[1].vq, &blk_engine_ops, -1, -1, { .fd = -1 }, NULL };
		CHECK_EQ(engine_attach(&w.engine, 0, &other, &cfg), -ESRCH);
		engine_detach(&w.engine, &other);
		engine_detach(&w.engine, &w.lanes[0].bq.engine);
		engine_destroy(&w.engine);
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	engine_release(&w.lanes[0].bq.engine, true);
	start_drivers(&w, 1);
	join_drivers(&w, 1);
	detach(&w, 0);
	world_destroy(&w);
}

/* ------------------------------------------------------------------ behind an IOMMU */

#define PAGE 512u /* smaller than a block, so that a request misses several times */

static void hold(struct world *w)
{
	for (unsigned i = 0; i < QUEUES; i++)
		engine_hold(&w->lanes[i].bq.engine);
}

static void release(struct world *w, bool look)
{
	for (unsigned i = 0; i < QUEUES; i++)
		engine_release(&w->lanes[i].bq.engine, look);
}

static bool map_what_is_missed(struct world *w)
{
	bool any = false;

	for (unsigned i = 0; i < QUEUES; i++) {
		struct virtqueue *vq = &w->lanes[i].vq;
		uint64_t page;

		if (LOAD_ACQUIRE(vq->report.fault) != VQ_MISS)
			continue;
		page = vq->report.value & ~(uint64_t)(PAGE - 1);
		hold(w);
		CHECK_EQ(iotlb_update(&w->tlb, page, PAGE, page, IOTLB_READ | IOTLB_WRITE), 0);
		virtqueue_retry(vq);
		release(w, true);
		any = true;
	}
	return any;
}

struct drivers {
	struct world *w;
	unsigned running;
};

static void *wait_for_drivers(void *arg)
{
	struct drivers *d = arg;

	join_drivers(d->w, QUEUES);
	__atomic_store_n(&d->running, 0, __ATOMIC_RELEASE);
	ring(engine_notice(&d->w->engine));
	return NULL;
}

/* Pages come when they are missed, and go at any time: nobody waits in vain. */
static void test_misses(void)
{
	struct world w;

	FOR_EACH_SETUP(s) {
		struct drivers d = { &w, 1 };
		uint64_t state = 1234567, count;
		pthread_t waiter;
		unsigned mapped = 0;

		world_init_behind(&w, true, setups[s].packed, setups[s].event_idx, setups[s].workers,
			   setups[s].aio);
		for (unsigned i = 0; i < QUEUES; i++)
			attach(&w, i);
		start_drivers(&w, QUEUES);
		CHECK_EQ(pthread_create(&waiter, NULL, wait_for_drivers, &d), 0);
		while (__atomic_load_n(&d.running, __ATOMIC_ACQUIRE)) {
			struct pollfd p = { .fd = engine_notice(&w.engine), .events = POLLIN };

			CHECK_EQ(poll(&p, 1, LONG_WAIT_MS), 1);
			CHECK(read(p.fd, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
			while (map_what_is_missed(&w))
				mapped++;
			if (!rnd(&state, 4)) {
				hold(&w);
				iotlb_invalidate(&w.tlb, GUEST + rnd(&state, w.size / PAGE) * PAGE, PAGE * 16);
				release(&w, false);
			}
		}
		pthread_join(waiter, NULL);
		CHECK(mapped > QUEUES);
		for (unsigned i = 0; i < QUEUES; i++)
			detach(&w, i);
		world_destroy(&w);
	}
}

int main(void)
{
	RUN(test_several_queues);
	RUN(test_misses);
	RUN(test_spinning_and_sleeping);
	RUN(test_taken_away_under_load);
	RUN(test_attached_at_once);
	RUN(test_without_a_kick);
	RUN(test_refused);
	RUN(test_broken);
	RUN(test_a_fork);
	return 0;
}
