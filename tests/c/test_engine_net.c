/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The network engine's thread against a driver in a thread of its own, which sends frames to an echo, compares
 * what comes back, in its order, and sleeps whenever the rules allow it, so that a kick or call that is lost
 * shows as a driver which waits for ever. Meanwhile the rings are taken from the engine, held, and given back.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "driver_net.h"
#include "engine_net.h"

#ifdef __SANITIZE_THREAD__
#define FRAMES 3000u
#define CHANGES 150u
#else
#define FRAMES 30000u
#define CHANGES 1000u
#endif

#define NUM 64u
#define AREA 8192u
#define SLOT 256u
#define LANE (3 * AREA + NUM * SLOT)
#define GUEST 0x100000000ull
#define IN_FLIGHT 32u /* no more than there are buffers for: nothing is dropped */
#define LONG_WAIT_MS 30000

static const int no_repairs;

struct lane { /* a ring */
	struct driver_queue dq;
	struct virtqueue vq;
	struct net_queue nq;
	struct net_slots slots;
	int kick, call;
};

struct world {
	struct guest_memory mem;
	uint8_t *host;
	struct engine engine;
	struct net_pair pair;
	struct lane rx, tx;
	struct net_rx nrx;
	struct net_tx ntx;
	uint32_t longest; /* of the driver's frames */
	bool done;	  /* atomic */
	uint64_t sleeps;
};

struct setup {
	bool packed, event_idx, mergeable;
	uint32_t rx_slot, longest;
	const char *name;
};

static const struct setup setups[] = {
	{ false, false, true, SLOT, 200, "split" },
	{ false, true, true, 64, 200, "split, event_idx, several buffers" },
	{ true, false, true, SLOT, 200, "packed" },
	{ true, true, false, SLOT, 200, "packed, event_idx, not mergeable" },
};

#define FOR_EACH_SETUP(s)                                                                          \
	for (const struct setup *s = setups; s < setups + sizeof(setups) / sizeof(setups[0]); s++) \
		if ((check_context = s->name))

static void lane_init(struct world *w, struct lane *l, unsigned index, const struct setup *s, uint32_t slot)
{
	uint8_t *at = w->host + index * LANE;
	struct virtqueue_areas areas = { at, at + AREA, at + 2 * AREA };
	uint32_t base = s->packed ? 0x80008000 : 0;
	struct driver_config driver = { .areas = areas, .num = NUM, .base = base, .packed = s->packed,
					.event_idx = s->event_idx };
	struct virtqueue_config device = { .areas = areas, .mem = &w->mem, .num = NUM, .base = base,
					   .packed = s->packed, .indirect = true, .event_idx = s->event_idx };

	l->slots = (struct net_slots){ at + 3 * AREA, GUEST + index * LANE + 3 * AREA, slot, NUM };
	l->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	CHECK(l->kick >= 0 && l->call >= 0);
	CHECK_EQ(driver_queue_init(&l->dq, &driver), 0);
	CHECK_EQ(virtqueue_init(&l->vq, &device), 0);
	l->nq.pair = &w->pair;
}

static void world_init(struct world *w, const struct setup *s)
{
	struct guest_region region;
	uint32_t bad;

	memset(w, 0, sizeof(*w));
	w->longest = s->longest;
	w->host = mmap(NULL, 2 * LANE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(w->host != MAP_FAILED);
	region = (struct guest_region){ GUEST, GUEST, 2 * LANE, w->host };
	CHECK_EQ(guest_memory_init(&w->mem, &region, 1, &bad), 0);
	CHECK_EQ(engine_init(&w->engine, 1, "net", &no_repairs, NULL), 0);
	CHECK_EQ(net_pair_init(&w->pair), 0);
	w->pair.wire = &net_wire_peer;
	w->pair.peer = &w->pair;
	w->pair.rules = (struct net_frame_rules){ .hdr_len = NET_HDR_MAX, .longest = 1518 };
	w->pair.rx.hdr_len = NET_HDR_MAX;
	w->pair.rx.longest = 1518;
	w->pair.rx.mergeable = s->mergeable;
	lane_init(w, &w->rx, 0, s, s->rx_slot);
	lane_init(w, &w->tx, 1, s, SLOT);
	CHECK_EQ(net_rx_init(&w->nrx, &w->rx.dq, &w->rx.slots, NET_HDR_MAX, s->mergeable, w->rx.kick), 0);
	CHECK_EQ(net_tx_init(&w->ntx, &w->tx.dq, &w->tx.slots, NET_HDR_MAX, w->tx.kick), 0);
	CHECK_EQ(net_rx_fill(&w->nrx), 0);
}

static void world_destroy(struct world *w)
{
	struct lane *lanes[] = { &w->rx, &w->tx };

	for (int i = 0; i < 2; i++) {
		driver_queue_destroy(&lanes[i]->dq);
		virtqueue_destroy(&lanes[i]->vq);
		close(lanes[i]->kick);
		close(lanes[i]->call);
	}
	net_rx_destroy(&w->nrx);
	net_tx_destroy(&w->ntx);
	net_pair_destroy(&w->pair);
	engine_destroy(&w->engine);
	guest_memory_destroy(&w->mem);
	munmap(w->host, 2 * LANE);
}

static void attach(struct world *w, struct lane *l)
{
	const struct engine_ops *ops = l == &w->rx ? &net_receive_ops : &net_transmit_ops;
	struct engine_queue_config cfg = { &l->vq, ops, l->kick, -1, { .fd = l->call }, NULL };

	CHECK_EQ(engine_attach(&w->engine, 0, &l->nq.engine, &cfg), 0);
}

static void detach(struct world *w, struct lane *l)
{
	engine_detach(&w->engine, &l->nq.engine);
	CHECK_EQ(l->vq.inuse, 0); /* what was taken ahead is given back */
}

/* In this order, and taken away in the other, nothing that is sent is lost. */
static void attach_both(struct world *w)
{
	attach(w, &w->rx);
	attach(w, &w->tx);
}

static void detach_both(struct world *w)
{
	detach(w, &w->tx);
	detach(w, &w->rx);
}

/* ------------------------------------------------------------------ the driver */

static uint32_t rnd(uint64_t *state, uint32_t below)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 33) % below;
}

static uint32_t make_frame(const struct world *w, uint8_t *to, uint64_t seq)
{
	uint32_t len = NET_ETH_HDR + (uint32_t)(seq * 7919 % (w->longest - NET_ETH_HDR + 1));

	for (uint32_t i = 0; i < len; i++)
		to[i] = (uint8_t)(seq * 31 + i);
	return len;
}

static uint64_t receive(struct world *w, uint64_t seq)
{
	uint8_t got[SLOT], want[SLOT];
	struct net_in frames[NET_BURST];
	int n = net_rx_take(&w->nrx, frames, NET_BURST);

	CHECK(n >= 0);
	for (int i = 0; i < n; i++, seq++) {
		CHECK_EQ(frames[i].len, make_frame(w, want, seq));
		net_rx_copy(&w->nrx, &frames[i], got);
		CHECK(!memcmp(got, want, frames[i].len));
	}
	CHECK_EQ(net_rx_release(&w->nrx), 0);
	return seq;
}

static void sleep_until_call(struct world *w)
{
	struct pollfd p = { .fd = w->rx.call, .events = POLLIN };
	uint64_t count;

	w->sleeps++;
	if (poll(&p, 1, LONG_WAIT_MS) != 1) {
		fprintf(stderr, "[%s] waits in vain: %s\n", check_context,
			virtqueue_more_used(&w->rx.dq) ? "was not called" : "was not served");
		exit(1);
	}
	CHECK(read(w->rx.call, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN);
}

static void *drive(void *arg)
{
	struct world *w = arg;
	uint64_t state = 88172645463325252ull, sent = 0, done = 0;
	/* The more buffers a frame takes, the fewer are in flight. */
	uint32_t buffers = (NET_HDR_MAX + w->longest + w->rx.slots.size - 1) / w->rx.slots.size;
	uint32_t most = NUM / buffers < IN_FLIGHT ? NUM / buffers : IN_FLIGHT;

	while (done < FRAMES) {
		uint8_t data[SLOT];

		for (uint32_t burst = 1 + rnd(&state, most); burst && sent < FRAMES && sent - done < most; burst--) {
			struct net_out out = { data, make_frame(w, data, sent), NULL };

			CHECK_EQ(net_tx_send(&w->ntx, &out, 1), 1);
			sent++;
		}
		for (uint64_t before = done; (done = receive(w, before)) == before && done < sent;)
			if (!virtqueue_enable_cb(&w->rx.dq))
				sleep_until_call(w);
		for (uint32_t n = rnd(&state, 4) ? 0 : rnd(&state, 3000); n; n--)
			cpu_relax();
	}
	__atomic_store_n(&w->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static bool is_done(struct world *w)
{
	return __atomic_load_n(&w->done, __ATOMIC_ACQUIRE);
}

static void finish(struct world *w, pthread_t driver)
{
	pthread_join(driver, NULL);
	detach_both(w);
	CHECK_EQ(w->pair.counters.tx_frames, FRAMES);
	CHECK_EQ(w->pair.counters.rx_frames, FRAMES);
	for (int i = 0; i < NET_DROPS; i++)
		CHECK_EQ(w->pair.counters.dropped[i], 0);
	world_destroy(w);
}

/* ------------------------------------------------------------------ tests */

static void test_echo(void)
{
	struct world w;
	pthread_t driver;

	FOR_EACH_SETUP(s) {
		world_init(&w, s);
		attach_both(&w);
		CHECK_EQ(pthread_create(&driver, NULL, drive, &w), 0);
		finish(&w, driver);
	}
}

static void test_taken_away_under_load(void)
{
	uint64_t state = 362436069;
	struct world w;
	pthread_t driver;

	FOR_EACH_SETUP(s) {
		world_init(&w, s);
		attach_both(&w);
		CHECK_EQ(pthread_create(&driver, NULL, drive, &w), 0);
		for (unsigned i = 0; i < CHANGES && !is_done(&w); i++) {
			struct engine_queue *q = rnd(&state, 2) ? &w.rx.nq.engine : &w.tx.nq.engine;

			if (rnd(&state, 4)) {
				engine_hold(q);
				CHECK_EQ(w.rx.vq.inuse, 0);
				CHECK_EQ(w.tx.vq.inuse, 0);
				engine_release(q, rnd(&state, 2));
			} else {
				detach_both(&w);
				attach_both(&w);
			}
		}
		finish(&w, driver);
	}
}

int main(void)
{
	RUN(test_echo);
	RUN(test_taken_away_under_load);
	return 0;
}
