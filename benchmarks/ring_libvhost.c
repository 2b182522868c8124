// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * QEMU's libvhost-user on the `ring` benchmark: pop, fill, one flush and one decision to notify a batch. Its
 * headers and ours cannot be in one file.
 */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include "libvhost_device.h"

#define AT_ONCE 256u

struct region { /* csrc's guest_region */
	uint64_t guest_addr, user_addr, size;
	uint8_t *host;
};

struct ring_libvhost {
	VuDev dev;
};

struct ring_libvhost *ring_libvhost_new(const struct region *regions, uint32_t nregions, uint32_t num, void *desc,
					void *avail, void *used)
{
	struct ring_libvhost *l = calloc(1, sizeof(*l));

	if (!l || !libvhost_init(&l->dev, num, desc, avail, used)) {
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
	l->dev.features |= 1ull << VIRTIO_RING_F_EVENT_IDX;
	l->dev.vq[0].call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
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
