/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * How a queue's driver is told of used buffers: through an eventfd that the driver waits on, or, for a
 * driver in this machine's own kernel, by an interrupt of a VDUSE device. Knows neither rings nor Python.
 */
#ifndef VHOST_CALL_H
#define VHOST_CALL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include "barrier.h"
#include "eventfd.h"
#include "vhost_uapi.h"

struct virtqueue_call {
	int fd;	     /* -1: nobody is told */
	bool vduse;  /* it is /dev/vduse/NAME ... */
	uint32_t vq; /* ... and the queue has this number there */
};

static inline int vduse_inject(const struct virtqueue_call *c)
{
	if (!ioctl(c->fd, (unsigned)VDUSE_VQ_INJECT_IRQ, &c->vq))
		return 0;
	/* The driver has reset the device, or the kernel has given it up: nobody is there to be told. */
	return errno == EINVAL || errno == EPERM ? 0 : -errno;
}

/* 0 or a negative errno. Never waits, as far as an eventfd allows that (see eventfd.h). */
static inline int virtqueue_call(const struct virtqueue_call *c)
{
	return likely(!c->vduse) ? eventfd_signal(c->fd) : vduse_inject(c);
}

#endif
