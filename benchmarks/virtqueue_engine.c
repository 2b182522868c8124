// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * csrc's device side on the `virtqueue` benchmark.
 */
#include <stdlib.h>

#include "virtqueue.h"
#include "virtqueue_bench.h"

struct engine {
	struct guest_memory mem;
	struct virtqueue vq;
	struct vhost_chain chains[DESCRIPTORS];
	struct vhost_chain *list[DESCRIPTORS];
};

struct engine *engine_new(const struct bench_memory *m)
{
	struct engine *e = calloc(1, sizeof(*e));
	struct guest_region region = {.guest_addr = m->guest, .user_addr = m->guest, .size = m->size, .host = m->host};
	struct virtqueue_config cfg = {
		.areas = {m->host + m->desc, m->host + m->avail, m->host + m->used},
		.num = m->num,
		.indirect = true,
	};
	uint32_t bad;

	if (!e)
		return NULL;
	cfg.mem = &e->mem;
	for (uint32_t i = 0; i < DESCRIPTORS; i++) {
		vhost_chain_init(&e->chains[i]);
		e->list[i] = &e->chains[i];
	}
	if (guest_memory_init(&e->mem, &region, 1, &bad) || virtqueue_init(&e->vq, &cfg)) {
		free(e);
		return NULL;
	}
	return e;
}

void engine_delete(struct engine *e)
{
	virtqueue_destroy(&e->vq);
	guest_memory_destroy(&e->mem);
	for (uint32_t i = 0; i < DESCRIPTORS; i++)
		vhost_chain_destroy(&e->chains[i]);
	free(e);
}

static int pop_all(struct engine *e)
{
	int n = virtqueue_pop_batch(&e->vq, e->list, DESCRIPTORS);

	__asm__ volatile("" : : "r"(e) : "memory");
	return n;
}

static void fill_all(struct engine *e, int n)
{
	struct virtqueue_used used[DESCRIPTORS];

	for (int i = 0; i < n; i++)
		used[i] = (struct virtqueue_used){ e->chains[i].id, WRITTEN };
	virtqueue_fill_batch(&e->vq, used, (unsigned)n);
	virtqueue_flush(&e->vq);
}

/* ns to pop what there is, `rounds` times; `descriptors`: how many buffers that were. */
uint64_t engine_walk(struct engine *e, struct bench_driver driver, uint32_t rounds, uint64_t *descriptors)
{
	uint64_t total = 0;

	for (*descriptors = 0; rounds--;) {
		uint64_t start;
		int n;

		driver.refill(driver.driver);
		start = bench_clock();
		n = pop_all(e);
		total += bench_clock() - start;
		for (int i = 0; i < n; i++)
			*descriptors += e->chains[i].in_num + e->chains[i].out_num;
		fill_all(e, n);
	}
	return total;
}

/* ns to give everything back, `rounds` times: published one by one, or together. */
uint64_t engine_push(struct engine *e, struct bench_driver driver, uint32_t rounds, bool together)
{
	uint64_t total = 0;

	while (rounds--) {
		uint64_t start;
		int n;

		driver.refill(driver.driver);
		n = pop_all(e);
		start = bench_clock();
		if (together)
			fill_all(e, n);
		else
			for (int i = 0; i < n; i++)
				virtqueue_push(&e->vq, e->chains[i].id, WRITTEN);
		total += bench_clock() - start;
	}
	return total;
}
