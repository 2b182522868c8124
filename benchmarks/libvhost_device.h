/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A device of QEMU's libvhost-user without a front-end: nobody connects, and its memory and its ring are set
 * up by hand, as if the messages had come.
 */
#ifndef BENCHMARKS_LIBVHOST_DEVICE_H
#define BENCHMARKS_LIBVHOST_DEVICE_H

#include <unistd.h>

#include "libvhost-user.h"

static void libvhost_panic(VuDev *dev, const char *why)
{
	(void)why;
	dev->broken = true; /* then it pops nothing more, and the check says so */
}

static void libvhost_set_watch(VuDev *dev, int fd, int condition, vu_watch_cb callback, void *data)
{
	(void)dev, (void)fd, (void)condition, (void)callback, (void)data;
}

static void libvhost_remove_watch(VuDev *dev, int fd)
{
	(void)dev, (void)fd;
}

/* With one queue, which is started, and no memory. */
static inline bool libvhost_init(VuDev *dev, uint32_t num, void *desc, void *avail, void *used)
{
	static const VuDevIface iface = {0};
	VuVirtq *vq;

	if (!vu_init(dev, 1, STDIN_FILENO, libvhost_panic, NULL, libvhost_set_watch, libvhost_remove_watch,
		     &iface))
		return false;
	dev->features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC;
	vq = &dev->vq[0];
	vq->vring.num = num;
	vq->vring.desc = desc;
	vq->vring.avail = avail;
	vq->vring.used = used;
	vq->enable = 1;
	vq->started = true;
	return true;
}

#endif
