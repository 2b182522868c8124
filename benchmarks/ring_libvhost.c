// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * QEMU's libvhost-user on the `ring` benchmark: pop, fill, one flush and one decision to notify a batch. Its
 * device is set up by hand, as if the messages had come. Its headers and ours cannot be in one file.
 */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "libvhost-user.h"

#define AT_ONCE 256u

struct region { /* csrc's guest_region */
	uint64_t guest_addr, user_addr, size;
	uint8_t *host;
};

struct ring_libvhost {
	VuDev dev;
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

struct ring_libvhost *ring_libvhost_new(const struct region *regions, uint32_t nregions, uint32_t num, void *desc,
					void *avail, void *used)
{
	static const VuDevIface iface = {0};
	struct ring_libvhost *l = calloc(1, sizeof(*l));
	VuVirtq *vq;

	if (!l || !vu_init(&l->dev, 1, STDIN_FILENO, panic, NULL, set_watch, remove_watch, &iface)) {
		free(l);
		return NULL;
	}
	l->dev.nregions = nregions;
	for (uint32_t i = 0; i < nregions; i++)
		l->dev.regions[i] = (VuDevRegion){
			.gpa = regions[i].guest_addr,
			.size = regions[i].size,
			.qva = regions[i].user_addr,
			.mmap_addr = (uintptr_t)regions[i].host,
		};
	l->dev.features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
			  1ull << VIRTIO_RING_F_EVENT_IDX;
	vq = &l->dev.vq[0];
	vq->vring.num = num;
	vq->vring.desc = desc;
	vq->vring.avail = avail;
	vq->vring.used = used;
	vq->enable = 1;
	vq->started = true;
	vq->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return l;
}

void ring_libvhost_serve(void *device)
{
	struct ring_libvhost *l = device;
	VuVirtq *vq = &l->dev.vq[0];
	VuVirtqElement *e;
	unsigned n = 0;

	while (n < AT_ONCE && (e = vu_queue_pop(&l->dev, vq, sizeof(*e)))) {
		uint32_t written = 0;

		__asm__ volatile("" : : "r"(e) : "memory");
		for (unsigned i = 0; i < e->in_num; i++)
			written += (uint32_t)e->in_sg[i].iov_len;
		vu_queue_fill(&l->dev, vq, e, written, n++);
		free(e);
	}
	vu_queue_flush(&l->dev, vq, n);
	vu_queue_notify(&l->dev, vq);
}
