/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Which pages a queue marks, and when they are too many for the log. */
#include "virtqueue_log.h"

#include <errno.h>

#include "chain_build.h"

static void beyond(struct virtqueue *vq, uint16_t head, uint64_t guest_addr)
{
	/* A miss passes; this does not. */
	if (!vq->report.fault || vq->report.fault == VQ_MISS)
		vq_report(vq, VQ_LOG_ADDRESS, head, guest_addr, dirty_log_limit(&vq->log->map));
}

static int find_guest(const struct virtqueue *vq, const void *host, uint64_t *guest_addr)
{
	const struct guest_region *r = guest_memory_search_host(virtqueue_memory(vq), host);

	if (!r)
		return -EFAULT;
	*guest_addr = r->guest_addr + (uint64_t)((const uint8_t *)host - r->host);
	return 0;
}

static int place_ring(const struct virtqueue *vq, struct virtqueue_log *log)
{
	const void *used = vq->is_packed ? (const void *)vq->packed.device : vq->split.used;

	if (!virtqueue_is_mapped(vq))
		return 0; /* nothing is written there, and virtqueue_map comes here again */
	if (!log->used_given && find_guest(vq, used, &log->used))
		return -EFAULT;
	if (!dirty_log_covers(&log->map, log->used, vring_device_size(vq->num, vq->is_packed)))
		return -ERANGE;
	if (!vq->is_packed)
		return 0;
	if (find_guest(vq, vq->packed.desc, &log->desc))
		return -EFAULT;
	return dirty_log_covers(&log->map, log->desc, vring_desc_size(vq->num)) ? 0 : -ERANGE;
}

int virtqueue_set_log(struct virtqueue *vq, struct virtqueue_log *log)
{
	int rc;

	vq->log = NULL;
	if (!log)
		return 0;
	rc = log->ring ? place_ring(vq, log) : 0;
	if (rc)
		return rc;
	vq->log = log;
	if (vq->is_packed) {
		virtqueue_mark_used(vq, 0, sizeof(*vq->packed.device));
	} else {
		virtqueue_mark_used(vq, 0, offsetof(struct vring_used, ring));
		virtqueue_mark_used(vq, offsetof(struct vring_used, ring[vq->num]), sizeof(uint16_t));
	}
	return 0;
}

void virtqueue_mark_chain(struct virtqueue *vq, const struct guest_memory *mem,
			  const struct vhost_chain *c, uint32_t len)
{
	const struct iovec *iov = c->iov + c->out_num;
	uint64_t guest_addr;

	for (uint32_t i = 0; len && i < c->in_num; i++) {
		uint32_t n = len < iov[i].iov_len ? len : (uint32_t)iov[i].iov_len;

		/* What was popped from memory that is no longer the guest's need not be migrated. */
		if (!dirty_log_mark_host(&vq->log->map, mem, iov[i].iov_base, n, &guest_addr) &&
		    mem == virtqueue_memory(vq))
			beyond(vq, c->id, guest_addr);
		vq->log->changed = true;
		len -= n;
	}
}

void virtqueue_log_write(struct virtqueue *vq, uint64_t guest_addr, uint64_t len)
{
	if (!vq->log)
		return;
	if (!dirty_log_mark(&vq->log->map, guest_addr, len))
		beyond(vq, 0, guest_addr);
	vq->log->changed = true;
}

void virtqueue_mark_elements(struct virtqueue *vq, uint64_t ring, uint32_t size, uint32_t first,
			     uint32_t count)
{
	uint32_t here = count < vq->num - first ? count : vq->num - first;

	if (!vq->log->ring)
		return;
	/* Covered, as virtqueue_set_log found. */
	dirty_log_mark(&vq->log->map, ring + (uint64_t)first * size, (uint64_t)here * size);
	dirty_log_mark(&vq->log->map, ring, (uint64_t)(count - here) * size);
	vq->log->changed = true;
}

void virtqueue_mark_used(struct virtqueue *vq, uint64_t offset, uint64_t len)
{
	if (!vq->log->ring)
		return;
	dirty_log_mark(&vq->log->map, vq->log->used + offset, len);
	vq->log->changed = true;
}
