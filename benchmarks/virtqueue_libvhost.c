// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * QEMU's libvhost-user on the `virtqueue` benchmark.
 */
#include <stdlib.h>

#include "libvhost_device.h"
#include "virtqueue_bench.h"

struct libvhost {
	VuDev dev;
	VuVirtqElement *elements[DESCRIPTORS];
};

struct libvhost *libvhost_new(const struct bench_memory *m)
{
	struct libvhost *l = calloc(1, sizeof(*l));

	if (!l || !libvhost_init(&l->dev, m->num, m->host + m->desc, m->host + m->avail, m->host + m->used)) {
		free(l);
		return NULL;
	}
	l->dev.nregions = 1;
	l->dev.regions[0] = (VuDevRegion){
		.gpa = m->guest,
		.size = m->size,
		.qva = m->guest,
		.mmap_addr = (uintptr_t)m->host,
	};
	return l;
}

void libvhost_delete(struct libvhost *l)
{
	free(l->dev.regions);
	free(l->dev.vq);
	free(l);
}

static unsigned pop_all(struct libvhost *l)
{
	unsigned n = 0;

	while (n < DESCRIPTORS && (l->elements[n] = vu_queue_pop(&l->dev, &l->dev.vq[0], sizeof(VuVirtqElement))))
		n++;
	return n;
}

static void fill_all(struct libvhost *l, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		vu_queue_fill(&l->dev, &l->dev.vq[0], l->elements[i], WRITTEN, i);
	vu_queue_flush(&l->dev, &l->dev.vq[0], n);
}

/* Elements are its caller's to free: a device does so for each request. */
static void free_all(struct libvhost *l, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		free(l->elements[i]);
}

/* As engine_walk(). */
uint64_t libvhost_walk(struct libvhost *l, struct bench_driver driver, uint32_t rounds, uint64_t *descriptors)
{
	uint64_t total = 0;

	for (*descriptors = 0; rounds--;) {
		uint64_t start;
		unsigned n;

		driver.refill(driver.driver);
		start = bench_clock();
		n = pop_all(l);
		total += bench_clock() - start;
		for (unsigned i = 0; i < n; i++)
			*descriptors += l->elements[i]->in_num + l->elements[i]->out_num;
		fill_all(l, n);
		free_all(l, n);
	}
	return total;
}

/* As engine_push(). */
uint64_t libvhost_push(struct libvhost *l, struct bench_driver driver, uint32_t rounds, bool together)
{
	uint64_t total = 0;

	while (rounds--) {
		uint64_t start;
		unsigned n;

		driver.refill(driver.driver);
		n = pop_all(l);
		start = bench_clock();
		if (together)
			fill_all(l, n);
		else
			for (unsigned i = 0; i < n; i++)
				vu_queue_push(&l->dev, &l->dev.vq[0], l->elements[i], WRITTEN);
		total += bench_clock() - start;
		free_all(l, n);
	}
	return total;
}
