/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* A batch where chains are popped one by one, in either format. */
#ifndef VHOST_DEVICE_POP_H
#define VHOST_DEVICE_POP_H

#include "virtqueue.h"

typedef int pop_fn(struct virtqueue *vq, struct vhost_chain *c);

/* How many, or -1: as virtqueue_pop_batch. */
static inline int pop_each(struct virtqueue *vq, struct vhost_chain **c, unsigned n, pop_fn *pop)
{
	unsigned done = 0;

	while (done < n) {
		int rc = pop(vq, c[done]);

		if (unlikely(rc < 0))
			return done ? (int)done : -1;
		if (!rc)
			break;
		done++;
	}
	return (int)done;
}

#endif
