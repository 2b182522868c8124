/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What driver_split.c and driver_packed.c share: the checks of a request, the indirect table's
 * bounds, the way a chain goes back to its owner. Knows the driver's private state; touches no
 * ring.
 */
#ifndef VHOST_DRIVER_IMPL_H
#define VHOST_DRIVER_IMPL_H

#include <errno.h>
#include <string.h>

#include "barrier.h"
#include "virtqueue.h"

/* More than any event index can tell apart, so counting further adds nothing. */
#define DRIVER_ADDED_MAX (2u * VRING_PACKED_NUM_MAX)

/* The device broke a rule: sticky. Returns what get_buf does. */
static inline int driver_fault(struct driver_queue *dq, enum virtqueue_fault fault, uint16_t head,
			       uint64_t value, uint64_t limit)
{
	dq->report.fault = fault;
	dq->report.head = head;
	dq->report.value = value;
	dq->report.limit = limit;
	return -1;
}

/*
 * Ring slots that the request takes, or what it is refused with. *in_len: its writable bytes. A
 * chain has at most as many buffers as the queue, in a table too (2.7.5.3.1, 2.8.17), and fewer
 * than 2^32 bytes (2.7.5.2).
 */
static inline int driver_request_slots(const struct driver_queue *dq,
				       const struct virtqueue_request *req, uint32_t *in_len)
{
	uint64_t n = (uint64_t)req->out + req->in, readable = 0, writable = 0;

	if (unlikely(dq->report.fault))
		return -EIO;
	if (unlikely(!n || n > dq->num))
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++) {
		const struct virtqueue_buf *b = &req->bufs[i];

		if (unlikely(!b->len || b->addr + (b->len - 1) < b->addr))
			return -EINVAL;
		*(i < req->out ? &readable : &writable) += b->len;
	}
	if (unlikely(readable + writable > UINT32_MAX))
		return -EINVAL;
	*in_len = (uint32_t)writable;
	if (n <= dq->indirect_max)
		n = 1;
	return n <= dq->num_free ? (int)n : -ENOSPC;
}

static inline uint64_t driver_indirect_addr(const struct driver_queue *dq, uint16_t id)
{
	return dq->indirect_addr + (uint64_t)id * dq->indirect_max * sizeof(struct vring_desc);
}

static inline void *driver_indirect_table(const struct driver_queue *dq, uint16_t id)
{
	return dq->indirect + (size_t)id * dq->indirect_max;
}

static inline void driver_count_added(struct driver_queue *dq, uint32_t n)
{
	if (dq->added < DRIVER_ADDED_MAX)
		dq->added += n;
}

/* What a chain's owner gets. The device's length is a claim: at most what it could have written. */
static inline void driver_complete(struct driver_queue *dq, uint16_t id, uint32_t len,
				   uint64_t *token, uint32_t *written)
{
	struct driver_slot *slot = &dq->slots[id];

	*token = slot->token;
	*written = len < slot->in_len ? len : slot->in_len;
	dq->claimed = len;
	dq->num_free += slot->ndesc;
	slot->ndesc = 0;
	dq->event_armed = false;
}

/*
 * IN_ORDER: one used element stands for every chain from the oldest up to the one that it names
 * (2.7.9, 2.8.8). Those before the last were used completely, by definition.
 */
static inline void driver_batch_open(struct driver_queue *dq, uint16_t last, uint32_t len)
{
	dq->batch_open = true;
	dq->batch_last = last;
	dq->batch_len = len;
}

/* The next chain of the batch, and how long the device says it is. Chains lie behind each other in
 * the ring, so that the oldest leads to the next by its size. */
static inline uint16_t driver_batch_next(struct driver_queue *dq, uint32_t *len)
{
	uint16_t id = dq->oldest;
	uint32_t next = (uint32_t)id + dq->slots[id].ndesc;

	dq->oldest = (uint16_t)(next < dq->num ? next : next - dq->num);
	*len = dq->slots[id].in_len;
	if (id == dq->batch_last) {
		*len = dq->batch_len;
		dq->batch_open = false;
	}
	return id;
}

#endif
