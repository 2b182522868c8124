/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The two formats behind virtqueue.h: the same functions, in the same order, in device_split.c and
 * device_packed.c, and in driver_split.c and driver_packed.c. virtqueue.c chooses between them. A device
 * also has split rings in the other byte order, device_split_swapped.c.
 */
#ifndef VHOST_RING_IMPL_H
#define VHOST_RING_IMPL_H

#include "virtqueue.h"

#define DECLARE_DEVICE(format)                                                                     \
	int format##_init(struct virtqueue *vq, const struct virtqueue_config *cfg);               \
	void format##_set_areas(struct virtqueue *vq, const struct virtqueue_areas *areas);        \
	int format##_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n);          \
	void format##_unpop(struct virtqueue *vq, uint16_t ndesc);                                 \
	int format##_fill(struct virtqueue *vq, uint16_t id, uint32_t written);                    \
	unsigned format##_fill_batch(struct virtqueue *vq, const struct virtqueue_used *used,      \
				     unsigned n);                                                  \
	void format##_flush(struct virtqueue *vq);                                                 \
	int format##_push(struct virtqueue *vq, uint16_t id, uint32_t written);                    \
	bool format##_should_notify(struct virtqueue *vq);                                         \
	void format##_disable_notification(struct virtqueue *vq);                                  \
	bool format##_enable_notification(struct virtqueue *vq);                                   \
	bool format##_has_work(struct virtqueue *vq);                                              \
	uint32_t format##_base(const struct virtqueue *vq)

#define DECLARE_DRIVER(format)                                                                     \
	int format##_driver_init(struct driver_queue *dq, const struct driver_config *cfg);        \
	uint32_t format##_driver_base(const struct driver_queue *dq);                              \
	uint32_t format##_driver_resume_base(const struct driver_queue *dq);                       \
	int format##_add(struct driver_queue *dq, const struct virtqueue_request *req);            \
	int format##_add_batch(struct driver_queue *dq, const struct virtqueue_request *reqs,      \
			       unsigned n);                                                        \
	bool format##_kick_prepare(struct driver_queue *dq);                                       \
	int format##_get_buf(struct driver_queue *dq, uint64_t *token, uint32_t *written);         \
	void format##_disable_cb(struct driver_queue *dq);                                         \
	bool format##_enable_cb(struct driver_queue *dq);                                          \
	bool format##_more_used(struct driver_queue *dq)

DECLARE_DEVICE(split);
DECLARE_DEVICE(swapped);
DECLARE_DEVICE(packed);
DECLARE_DRIVER(split);
DECLARE_DRIVER(packed);

#endif
