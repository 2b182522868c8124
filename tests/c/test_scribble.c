/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A third party that writes all over the ring while its driver and its device work on it: either
 * side may break, and is then made anew, but touches nothing outside its memory and never hangs.
 * What ASan and UBSan see is the test; for TSan there is nothing here but races.
 */
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "virtqueue.h"

#define NUM 16u
#define MEM_SIZE 4096u
#define GUEST 0x10000u
#define TABLE_MAX 4u
/* Before the test has seen enough: breaks of each side, chains that went through each. */
#define BREAKS 15u
#define CHAINS 500u

static struct setup {
	bool packed, event_idx, in_order;
} setup;

static uint8_t *memory; /* what the chains' buffers lie in */
static void *areas[4];	/* desc, avail, used, tables: each exactly as long as it is */
static size_t sizes[4];
static bool stop;
static unsigned faults[2][VQ_FAULTS], breaks[2], served, returned;

/* One side broke, or is stuck, which a wrong index may well do: both count, but only a fault is
 * one. */
static void count_break(unsigned side, enum virtqueue_fault fault)
{
	faults[side][fault]++;
	if (fault)
		WRITE_ONCE(breaks[side], breaks[side] + 1);
}

static bool enough(void)
{
	return READ_ONCE(breaks[0]) >= BREAKS && READ_ONCE(breaks[1]) >= BREAKS &&
	       READ_ONCE(served) >= CHAINS && READ_ONCE(returned) >= CHAINS;
}

static uint32_t rnd(uint64_t *state, uint32_t below)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (uint32_t)(*state >> 33) % below;
}

static void *scribbler(void *arg)
{
	static const uint16_t likely_ones[] = { 0, 1, 2, 3, 5, 0x80, 0x81, 0x8000, NUM - 1, NUM };
	uint64_t state = 88172645463325252ull;

	(void)arg;
	while (!READ_ONCE(stop)) {
		unsigned area = rnd(&state, 4);
		volatile uint16_t *at = areas[area];

		at += rnd(&state, (uint32_t)sizes[area] / 2);
		switch (rnd(&state, 4)) {
		case 0:
			*at = (uint16_t)rnd(&state, 65536);
			break;
		case 1:
			*at += (uint16_t)(1 + rnd(&state, NUM));
			break;
		case 2:
			*at ^= (uint16_t)(1u << rnd(&state, 16));
			break;
		default:
			*at = likely_ones[rnd(&state, sizeof(likely_ones) / 2)];
		}
		for (unsigned n = rnd(&state, 1500); n; n--)
			cpu_relax();
	}
	return NULL;
}

static void new_driver(struct driver_queue *dq)
{
	struct driver_config cfg = { .areas = { areas[0], areas[1], areas[2] },
				     .num = NUM,
				     .base = setup.packed ? 0x80008000 : 0,
				     .packed = setup.packed,
				     .event_idx = setup.event_idx,
				     .in_order = setup.in_order,
				     .indirect = areas[3],
				     .indirect_addr = GUEST + MEM_SIZE,
				     .indirect_max = TABLE_MAX };

	CHECK_EQ(driver_queue_init(dq, &cfg), 0);
}

static void *driver_thread(void *arg)
{
	uint64_t state = 0x9e3779b97f4a7c15ull, token;
	struct driver_queue dq;
	uint32_t written;

	(void)arg;
	new_driver(&dq);
	while (!enough()) {
		struct virtqueue_buf bufs[5];
		unsigned n = 1 + rnd(&state, 5), out = rnd(&state, n + 1), back = 0;
		int rc;

		for (unsigned i = 0; i < n; i++) {
			bufs[i].len = 1 + rnd(&state, 64);
			bufs[i].addr = GUEST + rnd(&state, MEM_SIZE - bufs[i].len + 1);
		}
		virtqueue_add(&dq, bufs, out, n - out, 1234);
		virtqueue_kick_prepare(&dq);
		while ((rc = virtqueue_get_buf(&dq, &token, &written)) > 0) {
			CHECK_EQ(token, 1234);
			CHECK(written <= 5 * 64);
			CHECK(++back <= NUM);
			WRITE_ONCE(returned, returned + 1);
		}
		if (rnd(&state, 2))
			virtqueue_disable_cb(&dq);
		else
			virtqueue_enable_cb(&dq);
		CHECK(dq.num_free <= NUM);
		if (rc < 0 || !rnd(&state, 300)) { /* broken; or stuck, which is allowed too */
			count_break(0, dq.report.fault);
			driver_queue_destroy(&dq);
			new_driver(&dq);
		}
	}
	driver_queue_destroy(&dq);
	return NULL;
}

static void new_device(struct virtqueue *vq, struct guest_memory *mem, uint64_t *state)
{
	uint32_t pos = rnd(state, NUM) | rnd(state, 2) << 15;
	struct virtqueue_config cfg = { .areas = { areas[0], areas[1], areas[2] },
					.mem = mem,
					.num = NUM,
					.base = pos * 0x10001u,
					.packed = setup.packed,
					.indirect = true,
					.event_idx = setup.event_idx,
					.in_order = setup.in_order };

	if (!setup.packed)
		cfg.base = READ_ONCE(((struct vring_avail *)areas[1])->idx);
	CHECK_EQ(virtqueue_init(vq, &cfg), 0);
}

static void use(struct virtqueue *vq, struct vhost_chain *c, uint64_t *state)
{
	volatile uint8_t sum = 0;
	uint32_t readable = 0, writable = 0;

	for (uint32_t i = 0; i < c->out_num + c->in_num; i++) {
		uint8_t *p = c->iov[i].iov_base;

		/* Buffers, or tables that a descriptor was turned on: guest memory in any case. */
		for (size_t k = 0; k < c->iov[i].iov_len; k++) {
			if (i < c->out_num)
				sum += p[k];
			else
				p[k] = (uint8_t)rnd(state, 256);
		}
		*(i < c->out_num ? &readable : &writable) += (uint32_t)c->iov[i].iov_len;
	}
	CHECK_EQ(readable, c->out_len);
	CHECK_EQ(writable, c->in_len);
	CHECK_EQ(virtqueue_fill(vq, c->id, rnd(state, c->in_len + 1)), 0);
	CHECK(virtqueue_fill(vq, c->id, 0) < 0);
	WRITE_ONCE(served, served + 1);
}

static void *device_thread(void *arg)
{
	uint64_t state = 0xbf58476d1ce4e5b9ull;
	struct vhost_chain chains[4], *list[4];
	struct virtqueue vq;

	for (unsigned i = 0; i < 4; i++) {
		vhost_chain_init(&chains[i]);
		list[i] = &chains[i];
	}
	new_device(&vq, arg, &state);
	while (!enough()) {
		int rc = virtqueue_pop_batch(&vq, list, 4);

		for (int i = 0; i < rc; i++)
			use(&vq, list[i], &state);
		virtqueue_flush(&vq);
		virtqueue_should_notify(&vq);
		if (rnd(&state, 2))
			virtqueue_disable_notification(&vq);
		else
			virtqueue_enable_notification(&vq);
		CHECK_EQ(vq.inuse, 0);
		if (rc < 0 || !rnd(&state, 300)) {
			count_break(1, vq.report.fault);
			virtqueue_destroy(&vq);
			new_device(&vq, arg, &state);
		}
	}
	virtqueue_destroy(&vq);
	for (unsigned i = 0; i < 4; i++)
		vhost_chain_destroy(&chains[i]);
	return NULL;
}

static void run(void)
{
	struct guest_region regions[2];
	struct guest_memory mem;
	pthread_t threads[3];
	uint32_t bad;

	sizes[0] = vring_desc_size(NUM);
	sizes[1] = vring_driver_size(NUM, setup.packed);
	sizes[2] = vring_device_size(NUM, setup.packed);
	sizes[3] = NUM * TABLE_MAX * 16;
	for (unsigned i = 0; i < 4; i++)
		areas[i] = calloc(1, sizes[i]);
	memory = calloc(1, MEM_SIZE);
	regions[0] = (struct guest_region){ GUEST, GUEST, MEM_SIZE, memory };
	regions[1] = regions[0];
	regions[1].guest_addr = regions[1].user_addr = GUEST + MEM_SIZE;
	regions[1].size = sizes[3];
	regions[1].host = areas[3];
	CHECK_EQ(guest_memory_init(&mem, regions, 2, &bad), 0);
	memset(faults, 0, sizeof(faults));
	served = returned = breaks[0] = breaks[1] = 0;
	WRITE_ONCE(stop, false);

	CHECK_EQ(pthread_create(&threads[0], NULL, scribbler, NULL), 0);
	CHECK_EQ(pthread_create(&threads[1], NULL, driver_thread, NULL), 0);
	CHECK_EQ(pthread_create(&threads[2], NULL, device_thread, &mem), 0);
	CHECK_EQ(pthread_join(threads[1], NULL), 0);
	CHECK_EQ(pthread_join(threads[2], NULL), 0);
	WRITE_ONCE(stop, true);
	CHECK_EQ(pthread_join(threads[0], NULL), 0);

	/* It worked in between, and it did go wrong on both sides, and in more than one way. */
	for (unsigned side = 0; side < 2; side++) {
		unsigned kinds = 0;

		for (unsigned f = VQ_OK + 1; f < VQ_FAULTS; f++)
			kinds += faults[side][f] != 0;
		CHECK(kinds >= 1 + side);
	}
	guest_memory_destroy(&mem);
	for (unsigned i = 0; i < 4; i++)
		free(areas[i]);
	free(memory);
}

static void test_scribbled_rings(void)
{
	static char context[80];

	for (unsigned bits = 0; bits < 8; bits++) {
		setup = (struct setup){ bits & 1, bits & 2, bits & 4 };
		snprintf(context, sizeof(context), "%s event_idx=%d in_order=%d",
			 setup.packed ? "packed" : "split", setup.event_idx, setup.in_order);
		check_context = context;
		run();
	}
}

int main(void)
{
	alarm(240); /* a hang ends here */
	RUN(test_scribbled_rings);
	return 0;
}
