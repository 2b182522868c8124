/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What split and packed rings have in common: life, faults, the order of completions, and the choice
 * between the two. A queue that is broken stops here, before it reaches either.
 */
#include "virtqueue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "inflight.h"
#include "ring_impl.h"
#include "ring_shadow.h"

#define FORMAT(q, call)                                                                            \
	((q)->is_packed ? packed_##call : likely(!(q)->swapped) ? split_##call : swapped_##call)
#define DRIVER_FORMAT(q, call) ((q)->is_packed ? packed_##call : split_##call)

static const char *const fault_text[VQ_FAULTS] = {
	[VQ_OK] = "no fault",
	[VQ_AVAIL_JUMP] = "available index ran ahead of the ring",
	[VQ_HEAD_RANGE] = "available head is outside the descriptor table",
	[VQ_HEAD_BUSY] = "head was made available again before it was used",
	[VQ_NEXT_RANGE] = "next descriptor is outside its table",
	[VQ_CHAIN_TOO_LONG] = "descriptor chain is longer than the ring allows, or loops",
	[VQ_CHAIN_OPEN] = "descriptor chain goes on in a slot that is not available",
	[VQ_ADDRESS] = "buffer is outside guest memory",
	[VQ_LENGTH_ZERO] = "buffer has length 0",
	[VQ_LENGTH_TOTAL] = "descriptor chain has 2^32 bytes or more",
	[VQ_TOO_MANY_PIECES] = "descriptor chain is scattered over too many pieces of memory",
	[VQ_WRITE_BEFORE_READ] = "device-readable buffer after a device-writable one",
	[VQ_INDIRECT_DISABLED] = "indirect descriptor, but the feature was not negotiated",
	[VQ_INDIRECT_NESTED] = "indirect descriptor inside an indirect table",
	[VQ_INDIRECT_NEXT] = "indirect descriptor with a next one",
	[VQ_INDIRECT_LENGTH] = "indirect table has no length, or no multiple of 16",
	[VQ_ID_RANGE] = "buffer id is outside the ring",
	[VQ_ID_BUSY] = "buffer id is still in use",
	[VQ_USED_ID] = "used element names a buffer that the device does not have",
	[VQ_USED_JUMP] = "used index ran ahead of what the device has",
	[VQ_USED_BATCH] = "used element stands for more buffers than were used",
	[VQ_LOG_ADDRESS] = "written page is outside the dirty log",
	[VQ_REQUEST_HEADER] = "request is shorter than its header",
	[VQ_REQUEST_STATUS] = "request has no room for its status",
	[VQ_INFLIGHT_VERSION] = "in-flight region has a version that is not known",
	[VQ_INFLIGHT_SIZE] = "in-flight region is for another queue size",
	[VQ_INFLIGHT_FLAG] = "in-flight region has a flag that is neither 0 nor 1",
	[VQ_INFLIGHT_INDEX] = "in-flight region names an entry or a position that does not exist",
	[VQ_INFLIGHT_LIST] = "in-flight region has a list that loops or does not end where it should",
	[VQ_INFLIGHT_BATCH] = "used index is too far from that of the in-flight region",
	[VQ_INFLIGHT_COUNT] = "in-flight region has more in flight than was made available",
	[VQ_INFLIGHT_CHAIN] = "in-flight region has descriptors that are no chain of their length",
	[VQ_ACCESS] = "buffer may not be accessed in this way",
	[VQ_MISS] = "IOTLB miss",
};

const char *virtqueue_fault_text(enum virtqueue_fault fault)
{
	return (unsigned)fault < VQ_FAULTS && fault_text[fault] ? fault_text[fault] : "unknown fault";
}

/* 2.7 and 2.8: split rings have a power of two of descriptors, packed ones any number. */
static bool valid_num(uint32_t num, bool packed)
{
	if (packed)
		return num && num <= VRING_PACKED_NUM_MAX;
	return num && num <= VRING_SPLIT_NUM_MAX && !(num & (num - 1));
}

/* ------------------------------------------------------------------ device side */

int virtqueue_init(struct virtqueue *vq, const struct virtqueue_config *cfg)
{
	int rc;

	memset(vq, 0, sizeof(*vq));
	if (!valid_num(cfg->num, cfg->packed) || (cfg->packed && cfg->swapped))
		return -EINVAL;
	vq->mem = cfg->mem;
	vq->num = cfg->num;
	vq->is_packed = cfg->packed;
	vq->swapped = cfg->swapped;
	vq->indirect = cfg->indirect;
	vq->event_idx = cfg->event_idx;
	vq->in_order = cfg->in_order;
	vq->iotlb = cfg->iotlb;
	if (cfg->inflight && (rc = inflight_alloc(vq, cfg->inflight, cfg->inflight_num)))
		return rc;
	rc = FORMAT(vq, init)(vq, cfg);
	if (!rc) {
		vq->slots = calloc(vq->num, sizeof(*vq->slots));
		if (vq->in_order)
			vq->order = calloc(vq->num, sizeof(*vq->order));
		if (vq->iotlb)
			vq->shadow = ring_shadow_new(vq->num, vq->is_packed);
		if (!vq->slots || (vq->in_order && !vq->order) || (vq->iotlb && !vq->shadow))
			rc = -ENOMEM;
	}
	if (rc) {
		virtqueue_destroy(vq);
		return rc;
	}
	virtqueue_enable_notification(vq);
	return 0;
}

void virtqueue_destroy(struct virtqueue *vq)
{
	free(vq->slots);
	free(vq->order);
	free(vq->shadow);
	inflight_free(vq);
	vq->slots = NULL;
	vq->order = NULL;
	vq->shadow = NULL;
}

void virtqueue_set_memory(struct virtqueue *vq, struct guest_memory *mem,
			  const struct virtqueue_areas *areas)
{
	vq->mem = mem;
	FORMAT(vq, set_areas)(vq, areas);
}

void virtqueue_retry(struct virtqueue *vq)
{
	if (vq->report.fault == VQ_MISS && virtqueue_is_mapped(vq))
		vq->report.fault = VQ_OK;
}

/* What a queue that does not go on gives instead of a chain. */
static int stopped(const struct virtqueue *vq)
{
	return vq->report.fault == VQ_MISS ? 0 : -1;
}

int virtqueue_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n)
{
	int rc;

	if (unlikely(vq->report.fault))
		return stopped(vq);
	rc = FORMAT(vq, pop_batch)(vq, c, n);
	return likely(rc >= 0) ? rc : stopped(vq);
}

int virtqueue_unpop(struct virtqueue *vq, const struct vhost_chain *c)
{
	struct vq_slot *slot;

	if (c->id >= vq->num)
		return -EINVAL;
	slot = &vq->slots[c->id];
	/* One that is done has a seq beyond the mask. */
	if (!slot->ndesc || slot->seq != ((vq->pops - 1) & VQ_SEQ_MASK))
		return -EINVAL;
	if (likely(!vq->inflight) || !inflight_unpop(vq, c->id))
		FORMAT(vq, unpop)(vq, slot->ndesc);
	vq->inuse -= slot->ndesc;
	vq->pops--;
	slot->ndesc = 0;
	if (vq->in_order)
		vq->order_count--;
	return 0;
}

int virtqueue_fill(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	return FORMAT(vq, fill)(vq, id, written);
}

static inline uint32_t in_circle(const struct virtqueue *vq, uint32_t i)
{
	return vq->order_head + i < vq->num ? vq->order_head + i : vq->order_head + i - vq->num;
}

static bool waits_for_elders(const struct virtqueue *vq, uint32_t i)
{
	return vq->slots[vq->order[in_circle(vq, i)]].seq & VQ_SLOT_DONE;
}

/* With in_order, what the batch begins with of those that are the oldest, in their order: how many. Nearly always it
 * is all of it. One that another waits for is left to virtqueue_fill, which stages both. */
static unsigned fill_oldest(struct virtqueue *vq, const struct virtqueue_used *used, unsigned n)
{
	unsigned most = n < vq->order_count ? n : vq->order_count, run = 0;

	while (run < most && vq->order[in_circle(vq, run)] == used[run].id && !waits_for_elders(vq, run))
		run++;
	if (unlikely(run && run < vq->order_count && waits_for_elders(vq, run)))
		run--;
	run = FORMAT(vq, fill_batch)(vq, used, run);
	vq->order_head = in_circle(vq, run);
	vq->order_count -= run;
	return run;
}

unsigned virtqueue_fill_batch(struct virtqueue *vq, const struct virtqueue_used *used, unsigned n)
{
	unsigned i, done = 0;

	if (likely(!vq->in_order && !vq->inflight))
		return FORMAT(vq, fill_batch)(vq, used, n);
	if (likely(!vq->inflight))
		done = fill_oldest(vq, used, n);
	for (i = done; i < n && !virtqueue_fill(vq, used[i].id, used[i].written); i++)
		;
	return i;
}

/* Behind an IOMMU, the ring is not there: see ring_shadow.h. It always says so in the report. */
static inline bool is_away(const struct virtqueue *vq)
{
	return unlikely(vq->report.fault) && !virtqueue_is_mapped(vq);
}

void virtqueue_flush(struct virtqueue *vq)
{
	if (is_away(vq))
		ring_shadow_flush(vq);
	else
		FORMAT(vq, flush)(vq);
}

int virtqueue_push(struct virtqueue *vq, uint16_t id, uint32_t written)
{
	int rc;

	if (!is_away(vq))
		return FORMAT(vq, push)(vq, id, written);
	rc = virtqueue_fill(vq, id, written);
	if (!rc)
		ring_shadow_flush(vq);
	return rc;
}

bool virtqueue_should_notify(struct virtqueue *vq)
{
	/* What was published before is decided on once the driver's wish can be read. */
	return !is_away(vq) && FORMAT(vq, should_notify)(vq);
}

void virtqueue_disable_notification(struct virtqueue *vq)
{
	vq->notify_off = true;
	FORMAT(vq, disable_notification)(vq);
}

bool virtqueue_enable_notification(struct virtqueue *vq)
{
	vq->notify_off = false;
	/* For what cannot go on there is nothing to look for again. */
	return (FORMAT(vq, enable_notification)(vq) || inflight_pending(vq)) && !vq->report.fault;
}

bool virtqueue_has_work(struct virtqueue *vq)
{
	return !vq->report.fault && (FORMAT(vq, has_work)(vq) || inflight_pending(vq));
}

uint32_t virtqueue_base(const struct virtqueue *vq)
{
	return FORMAT(vq, base)(vq);
}

/* ------------------------------------------------------------------ driver side */

int driver_queue_init(struct driver_queue *dq, const struct driver_config *cfg)
{
	int rc;

	memset(dq, 0, sizeof(*dq));
	if (!valid_num(cfg->num, cfg->packed))
		return -EINVAL;
	dq->num = dq->num_free = cfg->num;
	dq->is_packed = cfg->packed;
	dq->event_idx = cfg->event_idx;
	dq->in_order = cfg->in_order;
	if (cfg->indirect) {
		dq->indirect = cfg->indirect;
		dq->indirect_addr = cfg->indirect_addr;
		dq->indirect_max = cfg->indirect_max;
	}
	dq->slots = calloc(dq->num, sizeof(*dq->slots));
	if (!dq->slots)
		return -ENOMEM;
	rc = DRIVER_FORMAT(dq, driver_init)(dq, cfg);
	if (rc)
		driver_queue_destroy(dq);
	return rc;
}

void driver_queue_destroy(struct driver_queue *dq)
{
	free(dq->slots);
	dq->slots = NULL;
}

uint32_t driver_queue_base(const struct driver_queue *dq)
{
	return DRIVER_FORMAT(dq, driver_base)(dq);
}

uint32_t driver_queue_resume_base(const struct driver_queue *dq)
{
	return DRIVER_FORMAT(dq, driver_resume_base)(dq);
}

int virtqueue_add(struct driver_queue *dq, const struct virtqueue_buf *bufs, unsigned out,
		  unsigned in, uint64_t token)
{
	struct virtqueue_request req = { bufs, out, in, token };

	return DRIVER_FORMAT(dq, add)(dq, &req);
}

int virtqueue_add_batch(struct driver_queue *dq, const struct virtqueue_request *reqs, unsigned n)
{
	return DRIVER_FORMAT(dq, add_batch)(dq, reqs, n);
}

bool virtqueue_kick_prepare(struct driver_queue *dq)
{
	return DRIVER_FORMAT(dq, kick_prepare)(dq);
}

int virtqueue_get_buf(struct driver_queue *dq, uint64_t *token, uint32_t *written)
{
	if (unlikely(dq->report.fault))
		return -1;
	return DRIVER_FORMAT(dq, get_buf)(dq, token, written);
}

void virtqueue_disable_cb(struct driver_queue *dq)
{
	DRIVER_FORMAT(dq, disable_cb)(dq);
}

bool virtqueue_enable_cb(struct driver_queue *dq)
{
	return DRIVER_FORMAT(dq, enable_cb)(dq);
}

bool virtqueue_more_used(struct driver_queue *dq)
{
	return DRIVER_FORMAT(dq, more_used)(dq);
}
