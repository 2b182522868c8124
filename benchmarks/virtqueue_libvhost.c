// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * QEMU's libvhost-user on the `virtqueue` benchmark: its device is set up by hand, as if the messages had
 * come, for none of them is measured here.
 */
#include <stdlib.h>
#include <unistd.h>

#include "libvhost-user.h"
#include "virtqueue_bench.h"

struct libvhost {
	VuDev dev;
	VuVirtqElement *elements[DESCRIPTORS];
};

static void panic(VuDev *dev, const char *why)
{
	(void)why;
	dev->broken = true; /* then it pops nothing more, and the check says so */
}

static void set_watch(VuDev *dev, int fd, int condition, vu_watch_cb callback, void *data)
{
	(void)dev, (void)fd, (void)condition, (void)callback, (void)data;
}

static void remove_watch(VuDev *dev, int fd)
{
	(void)dev, (void)fd;
}

struct libvhost *libvhost_new(const struct bench_memory *m)
{
	static const VuDevIface iface = {0};
	struct libvhost *l = calloc(1, sizeof(*l));
	VuVirtq *vq;

	if (!l || !vu_init(&l->dev, 1, STDIN_FILENO, panic, NULL, set_watch, remove_watch, &iface)) {
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
	l->dev.features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC;
	vq = &l->dev.vq[0];
	vq->vring.num = m->num;
	vq->vring.desc = (struct vring_desc *)(m->host + m->desc);
	vq->vring.avail = (struct vring_avail *)(m->host + m->avail);
	vq->vring.used = (struct vring_used *)(m->host + m->used);
	vq->enable = 1;
	vq->started = true;
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
