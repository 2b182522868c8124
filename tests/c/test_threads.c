/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A driver thread and a device thread on one ring. Each checks the other's data, so that a missing
 * acquire or release shows as a race under TSan (or as wrong bytes), and each sleeps whenever the
 * rules allow it, so that a missing full barrier shows as a thread that sleeps next to pending
 * work.
 *
 * The doorbells are futexes with relaxed counters: they order nothing, which an eventfd would, and
 * so hide nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "virtqueue.h"

#ifdef __SANITIZE_THREAD__
#define CHAINS 2000u
#else
#define CHAINS 20000u
#endif

#define MAX_NUM 64u
#define MAX_BUFS 6u
#define BUF_SIZE 64u
#define SLOT_SIZE (MAX_BUFS * BUF_SIZE)
#define SPINS 300

/* Where the guest sees the two halves of its memory. */
#define GUEST_LOW 0x1000u
#define GUEST_HIGH 0x100000000ull

struct doorbell {
	uint32_t count;
	uint32_t seen; /* of the one who waits */
	const char *whose;
};

struct setup {
	bool packed, event_idx, in_order, indirect;
	bool keep_cb; /* the driver never turns callbacks off and trusts get_buf's 0 */
	uint32_t num, base;
	unsigned batch; /* chains published together, by either side */
	uint64_t chains;
};

struct world {
	const struct setup *s;
	struct guest_memory mem;
	uint8_t *low, *high; /* buffers; indirect tables */
	void *desc, *avail, *used;
	struct driver_queue dq;
	struct virtqueue vq;
	struct doorbell kick, call;
	uint64_t driver_sleeps, device_sleeps;
};

/* ------------------------------------------------------------------ helpers */

static uint32_t rnd(uint64_t *state, uint32_t below)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 33) % below;
}

static void ring(struct doorbell *d)
{
	__atomic_fetch_add(&d->count, 1, __ATOMIC_RELAXED);
	syscall(SYS_futex, &d->count, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Has it rung since the last time? Waits up to `seconds` for it. */
static bool wait_once(struct doorbell *d, int seconds)
{
	struct timespec end, now, left;
	uint32_t count = d->seen;

	for (int i = 0; i < SPINS && count == d->seen; i++) {
		count = READ_ONCE(d->count);
		cpu_relax();
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += seconds;
	while (count == d->seen) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		left.tv_sec = end.tv_sec - now.tv_sec;
		left.tv_nsec = end.tv_nsec - now.tv_nsec;
		if (left.tv_nsec < 0) {
			left.tv_nsec += 1000000000;
			left.tv_sec--;
		}
		if (left.tv_sec < 0)
			return false;
		syscall(SYS_futex, &d->count, FUTEX_WAIT_PRIVATE, d->seen, &left, NULL, 0);
		count = READ_ONCE(d->count);
	}
	d->seen = count;
	return true;
}

/* Sleeps until the doorbell rings. Work that lies there for seconds without a ring was never
 * announced; a silence without work is a slow machine. */
#define SLEEP(d, has_work)                                                                         \
	do {                                                                                       \
		unsigned silences = 0;                                                             \
		while (!wait_once(d, 1)) {                                                         \
			if ((has_work) && !wait_once(d, 4)) {                                      \
				fprintf(stderr, "%s sleeps next to work: [%s]\n", (d)->whose,      \
					check_context);                                            \
				exit(1);                                                           \
			}                                                                          \
			CHECK(++silences < 120);                                                   \
		}                                                                                  \
	} while (0)

static uint8_t pattern(uint64_t seq, uint32_t at)
{
	return (uint8_t)(seq * 0x9d + at * 7 + (at >> 3));
}

/* Moves the two threads' phases against each other, so that they meet in every window there is. */
static void pause_a_little(uint64_t *state)
{
	for (uint32_t n = rnd(state, 2) ? 0 : rnd(state, 40); n; n--)
		cpu_relax();
}

/* ------------------------------------------------------------------- driver */

struct pending { /* what the driver knows of a slot of buffers that is out */
	uint64_t seq;
	uint32_t out, in;
	uint32_t out_len, in_len;
	struct virtqueue_buf bufs[MAX_BUFS];
};

struct driver {
	struct world *w;
	struct pending slots[MAX_NUM];
	uint16_t free[MAX_NUM];
	uint32_t nfree;
	uint64_t sent, got, state;
};

static uint8_t *host(struct world *w, uint64_t guest_addr)
{
	return w->low + (guest_addr - GUEST_LOW);
}

static void prepare(struct driver *d, uint16_t slot)
{
	struct pending *p = &d->slots[slot];
	uint32_t most = d->w->s->num < MAX_BUFS ? d->w->s->num : MAX_BUFS;
	uint32_t n = 1 + rnd(&d->state, most), at = 0;

	p->seq = d->sent;
	p->out = rnd(&d->state, n + 1);
	p->in = n - p->out;
	p->out_len = p->in_len = 0;
	for (uint32_t i = 0; i < n; i++) {
		struct virtqueue_buf *b = &p->bufs[i];

		b->addr = GUEST_LOW + slot * SLOT_SIZE + i * BUF_SIZE;
		b->len = 1 + rnd(&d->state, BUF_SIZE);
		if (i < p->out) {
			for (uint32_t k = 0; k < b->len; k++)
				host(d->w, b->addr)[k] = pattern(p->seq, at++);
			p->out_len += b->len;
		} else {
			memset(host(d->w, b->addr), 0xee, b->len);
			p->in_len += b->len;
		}
	}
}

/* One batch, or as much of it as fits; how many were added. */
static unsigned send_some(struct driver *d)
{
	struct virtqueue_request reqs[MAX_NUM];
	uint16_t used[MAX_NUM];
	unsigned n = 0;
	int rc;

	while (n < d->w->s->batch && d->nfree && d->sent < d->w->s->chains) {
		uint16_t slot = d->free[--d->nfree];
		struct pending *p = &d->slots[slot];

		prepare(d, slot);
		d->sent++;
		used[n] = slot;
		reqs[n++] = (struct virtqueue_request){ p->bufs, p->out, p->in, slot };
	}
	if (!n)
		return 0;
	if (n == 1) {
		rc = virtqueue_add(&d->w->dq, reqs->bufs, reqs->out, reqs->in, reqs->token);
		rc = rc < 0 ? rc : 1;
	} else {
		rc = virtqueue_add_batch(&d->w->dq, reqs, n);
	}
	if (rc < 0) {
		CHECK_EQ(rc, -ENOSPC);
		rc = 0;
	}
	for (unsigned i = n; i > (unsigned)rc; i--) { /* those that did not fit: later */
		d->free[d->nfree++] = used[i - 1];
		d->sent--;
	}
	return (unsigned)rc;
}

static bool receive(struct driver *d)
{
	struct pending *p;
	uint64_t token;
	uint32_t written, at = 0;
	int rc = virtqueue_get_buf(&d->w->dq, &token, &written);

	CHECK(rc >= 0);
	if (!rc)
		return false;
	CHECK(token < MAX_NUM);
	p = &d->slots[token];
	if (d->w->s->in_order) {
		CHECK_EQ(p->seq, d->got);
		CHECK_EQ(written, p->in_len);
	}
	CHECK(written <= p->in_len);
	for (uint32_t i = p->out; i < p->out + p->in; i++) {
		for (uint32_t k = 0; k < p->bufs[i].len && at < written; k++)
			CHECK_EQ(host(d->w, p->bufs[i].addr)[k], pattern(~p->seq, at++));
	}
	d->free[d->nfree++] = (uint16_t)token;
	d->got++;
	return true;
}

static void *driver_thread(void *arg)
{
	struct driver *d = arg;
	struct driver_queue *dq = &d->w->dq;

	while (d->got < d->w->s->chains) {
		bool added = false, received = false;

		while (send_some(d)) {
			added = true;
			if (virtqueue_kick_prepare(dq))
				ring(&d->w->kick);
			pause_a_little(&d->state);
		}
		if (!d->w->s->keep_cb)
			virtqueue_disable_cb(dq);
		while (receive(d))
			received = true;
		if (added || received || d->got == d->w->s->chains)
			continue;
		if (!d->w->s->keep_cb) {
			pause_a_little(&d->state); /* to meet the other side's last look */
			if (virtqueue_enable_cb(dq))
				continue;
		}
		/* Nothing can be added, nothing came: sleep. */
		d->w->driver_sleeps++;
		SLEEP(&d->w->call, virtqueue_more_used(dq));
	}
	CHECK_EQ(dq->num_free, d->w->s->num);
	return NULL;
}

/* ------------------------------------------------------------------- device */

struct held {
	struct vhost_chain chain;
	uint64_t seq;
};

struct device {
	struct world *w;
	struct held pool[MAX_NUM], *spare[MAX_NUM], *held[MAX_NUM];
	unsigned nspare, nheld;
	uint64_t popped, done, state;
};

/* Checks what can be read, answers, and says how much it wrote. Chains come in the order in which
 * they were sent, so that the request's number need not be told. */
static uint32_t serve(struct device *d, const struct held *h)
{
	const struct vhost_chain *c = &h->chain;
	uint32_t at = 0, want;

	for (uint32_t i = 0; i < c->out_num; i++) {
		const uint8_t *p = c->iov[i].iov_base;

		for (size_t k = 0; k < c->iov[i].iov_len; k++, at++)
			CHECK_EQ(p[k], pattern(h->seq, at));
	}
	CHECK_EQ(at, c->out_len);
	/* With IN_ORDER a chain may be skipped in the used ring, which says that it was written
	 * full. */
	want = d->w->s->in_order ? c->in_len : rnd(&d->state, c->in_len + 1);
	at = 0;
	for (uint32_t i = c->out_num; i < c->out_num + c->in_num; i++) {
		uint8_t *p = c->iov[i].iov_base;

		for (size_t k = 0; k < c->iov[i].iov_len && at < want; k++, at++)
			p[k] = pattern(~h->seq, at);
	}
	return want;
}

static bool pop_some(struct device *d)
{
	struct vhost_chain *chains[MAX_NUM];
	unsigned n = d->w->s->batch < d->nspare ? d->w->s->batch : d->nspare;
	int rc;

	if (!n)
		return false;
	for (unsigned i = 0; i < n; i++)
		chains[i] = &d->spare[d->nspare - 1 - i]->chain;
	rc = n == 1 ? virtqueue_pop(&d->w->vq, chains[0]) :
		      virtqueue_pop_batch(&d->w->vq, chains, n);
	CHECK(rc >= 0);
	for (int i = 0; i < rc; i++) {
		struct held *h = d->spare[--d->nspare];

		h->seq = d->popped++;
		d->held[d->nheld++] = h;
	}
	return rc > 0;
}

/* Completes n of the chains that are held, in any order: with IN_ORDER that is the queue's worry.
 * */
static void complete_some(struct device *d, unsigned n)
{
	while (n--) {
		unsigned i = rnd(&d->state, d->nheld);
		struct held *h = d->held[i];

		CHECK_EQ(virtqueue_fill(&d->w->vq, h->chain.id, serve(d, h)), 0);
		d->held[i] = d->held[--d->nheld];
		d->spare[d->nspare++] = h;
		d->done++;
		if (d->w->s->batch == 1) {
			virtqueue_flush(&d->w->vq);
			if (virtqueue_should_notify(&d->w->vq))
				ring(&d->w->call);
		}
	}
	if (d->w->s->batch > 1) {
		virtqueue_flush(&d->w->vq);
		if (virtqueue_should_notify(&d->w->vq))
			ring(&d->w->call);
	}
}

static void *device_thread(void *arg)
{
	struct device *d = arg;
	struct virtqueue *vq = &d->w->vq;

	for (;;) {
		virtqueue_disable_notification(vq);
		while (pop_some(d)) {
			complete_some(d, rnd(&d->state, d->nheld + 1));
			pause_a_little(&d->state);
		}
		complete_some(d, d->nheld);
		if (d->done == d->w->s->chains)
			break;
		pause_a_little(&d->state);
		if (virtqueue_enable_notification(vq))
			continue;
		d->w->device_sleeps++;
		SLEEP(&d->w->kick, virtqueue_has_work(vq));
	}
	CHECK_EQ(vq->inuse, 0);
	return NULL;
}

/* -------------------------------------------------------------------- tests */

static char context[160];

static void world_init(struct world *w, const struct setup *s)
{
	struct guest_region regions[2];
	uint32_t bad;

	memset(w, 0, sizeof(*w));
	w->s = s;
	w->kick.whose = "device";
	w->call.whose = "driver";
	w->low = malloc(MAX_NUM * SLOT_SIZE);
	w->high = malloc(MAX_NUM * MAX_BUFS * 16);
	w->desc = aligned_alloc(16, vring_desc_size(s->num));
	w->avail = malloc(vring_driver_size(s->num, s->packed));
	w->used = malloc(vring_device_size(s->num, s->packed));
	regions[0] = (struct guest_region){ GUEST_HIGH, GUEST_HIGH, MAX_NUM * MAX_BUFS * 16,
					    w->high };
	regions[1] = (struct guest_region){ GUEST_LOW, GUEST_LOW, MAX_NUM * SLOT_SIZE, w->low };
	CHECK_EQ(guest_memory_init(&w->mem, regions, 2, &bad), 0);
}

static void world_free(struct world *w)
{
	guest_memory_destroy(&w->mem);
	free(w->low);
	free(w->high);
	free(w->desc);
	free(w->avail);
	free(w->used);
}

static void queues_init(struct world *w)
{
	const struct setup *s = w->s;
	struct driver_config dc = { .areas = { w->desc, w->avail, w->used },
				    .num = s->num,
				    .base = s->base,
				    .packed = s->packed,
				    .event_idx = s->event_idx,
				    .in_order = s->in_order };
	struct virtqueue_config vc = { .areas = { w->desc, w->avail, w->used },
				       .mem = &w->mem,
				       .num = s->num,
				       .base = s->base,
				       .packed = s->packed,
				       .indirect = s->indirect,
				       .event_idx = s->event_idx,
				       .in_order = s->in_order };

	if (s->indirect) {
		dc.indirect = (struct vring_desc *)w->high;
		dc.indirect_addr = GUEST_HIGH;
		dc.indirect_max = MAX_BUFS - 1; /* so that the longest chains go without */
	}
	CHECK_EQ(driver_queue_init(&w->dq, &dc), 0);
	CHECK_EQ(virtqueue_init(&w->vq, &vc), 0);
}

/* Over all runs of a test: a single one may have a schedule in which nobody ever has to sleep. */
static uint64_t driver_slept, device_slept;

static void run(const struct setup *s)
{
	static struct world w;
	static struct driver driver;
	static struct device device;
	pthread_t threads[2];

	snprintf(context, sizeof(context),
		 "%s num=%u event_idx=%d in_order=%d indirect=%d keep_cb=%d batch=%u",
		 s->packed ? "packed" : "split", s->num, s->event_idx, s->in_order, s->indirect,
		 s->keep_cb, s->batch);
	check_context = context;
	world_init(&w, s);
	queues_init(&w);
	memset(&driver, 0, sizeof(driver));
	memset(&device, 0, sizeof(device));
	driver.w = device.w = &w;
	driver.state = 0x9e3779b97f4a7c15ull;
	device.state = 0xbf58476d1ce4e5b9ull;
	for (uint16_t i = 0; i < MAX_NUM; i++) {
		driver.free[driver.nfree++] = i;
		vhost_chain_init(&device.pool[i].chain);
		device.spare[device.nspare++] = &device.pool[i];
	}
	CHECK_EQ(pthread_create(&threads[0], NULL, driver_thread, &driver), 0);
	CHECK_EQ(pthread_create(&threads[1], NULL, device_thread, &device), 0);
	CHECK_EQ(pthread_join(threads[0], NULL), 0);
	CHECK_EQ(pthread_join(threads[1], NULL), 0);
	CHECK_EQ(device.done, s->chains);
	driver_slept += w.driver_sleeps;
	device_slept += w.device_sleeps;
	for (unsigned i = 0; i < MAX_NUM; i++)
		vhost_chain_destroy(&device.pool[i].chain);
	virtqueue_destroy(&w.vq);
	driver_queue_destroy(&w.dq);
	world_free(&w);
}

static void run_all(bool packed, bool event_idx)
{
	static const uint32_t split_nums[] = { 1, 8, 64 }, packed_nums[] = { 1, 7, 48 };
	static const unsigned batches[] = { 1, 1, 16 };

	driver_slept = device_slept = 0;
	for (unsigned bits = 0; bits < 8; bits++) {
		for (unsigned i = 0; i < 3; i++) {
			struct setup s = { .packed = packed,
					   .event_idx = event_idx,
					   .in_order = bits & 1,
					   .indirect = bits & 2,
					   .keep_cb = bits & 4,
					   .num = packed ? packed_nums[i] : split_nums[i],
					   .base = packed ? 0x80008000 : 0xfff0,
					   .batch = batches[i],
					   .chains = CHAINS };

			/* One chain at a time makes the two meet most often, and this is where
			 * a barrier is missed that the others' work covers up. */
			if (!i && !bits)
				s.chains *= 8;
			run(&s);
		}
	}
	CHECK(driver_slept && device_slept);
}

static void test_split(void)
{
	run_all(false, false);
}

static void test_split_event_idx(void)
{
	run_all(false, true);
}

static void test_packed(void)
{
	run_all(true, false);
}

static void test_packed_event_idx(void)
{
	run_all(true, true);
}

int main(void)
{
	RUN(test_split);
	RUN(test_split_event_idx);
	RUN(test_packed);
	RUN(test_packed_event_idx);
	return 0;
}
