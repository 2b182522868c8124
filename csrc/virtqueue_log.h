/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a queue marks in a dirty log: the buffers that its device wrote, and what it wrote to the ring
 * itself. The device's half of a migration (vhost-user, "Migration").
 *
 * Pages are marked after they were written, and before the used element that gives them to the driver is
 * visible. What is not published by the time that the ring stops belongs to the device still, and its
 * contents to nobody. With logging off, vq->log is NULL, and each function below costs that look.
 */
#ifndef VHOST_VIRTQUEUE_LOG_H
#define VHOST_VIRTQUEUE_LOG_H

#include "dirty_log.h"
#include "iotlb.h"
#include "virtqueue.h"

struct virtqueue_log {
	struct dirty_log map;
	bool ring;	     /* mark what is written to the ring, too: VHOST_VRING_F_LOG */
	bool used_given;     /* by the driver's side; otherwise virtqueue_set_log looks it up */
	uint64_t used;	     /* guest address of the used ring (packed: of the device's event area) */
	uint64_t desc;	     /* packed: of the descriptors, which used elements are written over */
	int fd;		     /* eventfd to be signalled when something was marked; -1: none */
	bool changed;	     /* something was, and nobody told yet */
};

/*
 * Logs from now on to *log, which is the caller's and stays there until there is another one, or NULL.
 * 0; -ERANGE: the ring is not wholly covered; -EFAULT: it is in no region. Then logging is off. To be
 * called again when the memory changes. What the device wrote to the ring's event area when it was made
 * is marked here; chains that are out are marked when they are given back.
 */
int virtqueue_set_log(struct virtqueue *vq, struct virtqueue_log *log);

/* Memory by its guest addresses, which an IOMMU's are not. */
static inline struct guest_memory *virtqueue_memory(const struct virtqueue *vq)
{
	return vq->iotlb ? vq->iotlb->memory : vq->mem;
}

void virtqueue_mark_chain(struct virtqueue *vq, const struct guest_memory *mem,
			  const struct vhost_chain *c, uint32_t len) __attribute__((cold));

/* Before virtqueue_fill: the device may have written the first `len` writable bytes of the chain, whose
 * iovecs are as they were popped, from `mem`. A page that the log does not cover breaks the queue: its
 * contents would be lost. */
static inline void virtqueue_log_chain(struct virtqueue *vq, const struct guest_memory *mem,
				       const struct vhost_chain *c, uint32_t len)
{
	if (unlikely(vq->log))
		virtqueue_mark_chain(vq, mem, c, len);
}

/* The device wrote `len` bytes at a guest address that no chain has to do with. */
void virtqueue_log_write(struct virtqueue *vq, uint64_t guest_addr, uint64_t len);

/* Must the log's eventfd be signalled for what was marked since the last call? */
static inline bool virtqueue_should_tell_log(struct virtqueue *vq)
{
	bool tell = unlikely(vq->log) && vq->log->changed && vq->log->fd >= 0;

	if (tell)
		vq->log->changed = false;
	return tell;
}

/* For device_*.c, where vq->log is known to be there: `count` elements of a ring from `first` on, which
 * may wrap; and some bytes of the used ring, or of the device's event area. */
void virtqueue_mark_elements(struct virtqueue *vq, uint64_t ring, uint32_t size, uint32_t first,
			     uint32_t count) __attribute__((cold));
void virtqueue_mark_used(struct virtqueue *vq, uint64_t offset, uint64_t len) __attribute__((cold));

#endif
