/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The driver's side of a packed virtqueue (VIRTIO 1.2, 2.8). Knows the ring in shared memory and
 * the driver's private slots; knows neither whose memory the buffers are nor how anybody is
 * signalled.
 *
 * The device may be hostile and can write all of the ring: nothing that the driver relies on is
 * read back from there but the used element itself, each field once. Slots of the ring are taken
 * and come back in ring order, buffer ids do not: they have a free list of their own. With IN_ORDER
 * a chain's id is its first slot, which leads from the oldest chain to the next without a list.
 */
#include "driver_impl.h"
#include "ring_impl.h"

#define USED_FLAGS (VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED)

/* 2.8.1: available is "avail equals the wrap counter, used does not"; used is "both equal it". */
static inline uint16_t flags_available(bool wrap)
{
	return wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED;
}

static inline uint16_t flags_used(bool wrap)
{
	return wrap ? USED_FLAGS : 0;
}

static inline uint16_t off_wrap(uint16_t off, bool wrap)
{
	return off | (wrap ? VRING_PACKED_EVENT_WRAP : 0);
}

int packed_driver_init(struct driver_queue *dq, const struct driver_config *cfg)
{
	uint16_t avail = cfg->base & 0xffff, used = cfg->base >> 16;
	uint16_t pos = avail & ~VRING_PACKED_EVENT_WRAP;

	/* Two positions that differ mean chains that some other driver has out: we cannot take
	 * them. */
	if (avail != used || pos >= dq->num)
		return -EINVAL;
	dq->packed.desc = cfg->areas.desc;
	dq->packed.driver = cfg->areas.avail;
	dq->packed.device = cfg->areas.used;
	memset(dq->packed.desc, 0, vring_desc_size(dq->num));
	memset(dq->packed.driver, 0, vring_driver_size(dq->num, 1));
	memset(dq->packed.device, 0, vring_device_size(dq->num, 1));

	dq->avail = dq->last_used = dq->oldest = pos;
	dq->free_head = 0;
	dq->avail_wrap = dq->used_wrap = avail & VRING_PACKED_EVENT_WRAP;
	if (dq->event_idx) {
		WRITE_ONCE(dq->packed.driver->off_wrap, off_wrap(dq->last_used, dq->used_wrap));
		WRITE_ONCE(dq->packed.driver->flags, VRING_PACKED_EVENT_FLAG_DESC);
	}
	dq->event_armed = true;

	for (uint32_t i = 0; i < dq->num; i++)
		dq->slots[i].next = (uint16_t)(i + 1); /* num_free says where it ends */
	return 0;
}

uint32_t packed_driver_base(const struct driver_queue *dq)
{
	return off_wrap(dq->avail, dq->avail_wrap) |
	       (uint32_t)off_wrap(dq->last_used, dq->used_wrap) << 16;
}

uint32_t packed_driver_resume_base(const struct driver_queue *dq)
{
	return off_wrap(dq->last_used, dq->used_wrap) * 0x10001u;
}

static void put_desc(struct vring_packed_desc *d, const struct virtqueue_buf *b, uint16_t id)
{
	d->addr = b->addr;
	d->len = b->len;
	d->id = id;
}

static void put_table(struct driver_queue *dq, uint16_t id, const struct virtqueue_request *req)
{
	struct vring_packed_desc *table = driver_indirect_table(dq, id);
	uint32_t n = req->out + req->in;
	struct virtqueue_buf b = { driver_indirect_addr(dq, id), n * 16 };

	/* Entries follow each other; WRITE is the only flag that means something (2.8.7). */
	for (uint32_t i = 0; i < n; i++) {
		put_desc(&table[i], &req->bufs[i], 0);
		table[i].flags = i < req->out ? 0 : VRING_DESC_F_WRITE;
	}
	put_desc(&dq->packed.desc[dq->avail], &b, id);
}

static inline void advance(struct driver_queue *dq)
{
	if (unlikely(++dq->avail == dq->num)) {
		dq->avail = 0;
		dq->avail_wrap = !dq->avail_wrap;
	}
}

/* Lays one chain out, all but the flags of its first slot, which it returns in *flags: the device
 * does not look past that slot before they are there (2.8.6). */
static int stage(struct driver_queue *dq, const struct virtqueue_request *req, uint16_t *flags)
{
	uint16_t id = dq->in_order ? dq->avail : dq->free_head;
	uint32_t n = req->out + req->in, in_len;
	int slots = driver_request_slots(dq, req, &in_len);

	if (unlikely(slots < 0))
		return slots;
	if ((uint32_t)slots < n) {
		put_table(dq, id, req);
		*flags = VRING_DESC_F_INDIRECT | flags_available(dq->avail_wrap);
		advance(dq);
	} else {
		for (uint32_t i = 0; i < n; i++) {
			struct vring_packed_desc *d = &dq->packed.desc[dq->avail];
			uint16_t f = flags_available(dq->avail_wrap);

			f |= (i < req->out ? 0 : VRING_DESC_F_WRITE) |
			     (i + 1 < n ? VRING_DESC_F_NEXT : 0);
			put_desc(d, &req->bufs[i], id);
			if (i)
				WRITE_ONCE(d->flags, f);
			else
				*flags = f;
			advance(dq);
		}
	}
	dq->free_head = dq->slots[id].next;
	dq->num_free -= (uint32_t)slots;
	driver_count_added(dq, (uint32_t)slots);

	struct driver_slot *slot = &dq->slots[id];

	slot->token = req->token;
	slot->in_len = in_len;
	slot->ndesc = (uint16_t)slots;
	return id;
}

static void publish(struct driver_queue *dq, uint16_t head, uint16_t flags)
{
	/* Descriptors, tables, later flags and the buffers' contents before these flags. Pairs with
	 * the acquire of the flags in packed_take(). */
	STORE_RELEASE(dq->packed.desc[head].flags, flags);
}

int packed_add(struct driver_queue *dq, const struct virtqueue_request *req)
{
	uint16_t head = dq->avail, flags;
	int id = stage(dq, req, &flags);

	if (likely(id >= 0))
		publish(dq, head, flags);
	return id;
}

int packed_add_batch(struct driver_queue *dq, const struct virtqueue_request *reqs, unsigned n)
{
	uint16_t first = dq->avail, first_flags = 0;
	unsigned i;
	int rc = 0;

	for (i = 0; i < n; i++) {
		uint16_t head = dq->avail, flags;

		rc = stage(dq, &reqs[i], &flags);
		if (rc < 0)
			break;
		if (!i)
			first_flags = flags;
		else
			WRITE_ONCE(dq->packed.desc[head].flags, flags);
	}
	if (!i)
		return rc;
	publish(dq, first, first_flags);
	return (int)i;
}

bool packed_kick_prepare(struct driver_queue *dq)
{
	uint32_t added = dq->added, cycle = 2 * dq->num, here, event;
	uint16_t flags, asked;

	if (!added)
		return false;
	dq->added = 0;
	/* The flags of the ring before the look at what the device asks for. Pairs with the barrier
	 * in packed_enable_notification(): either we see its wish or it sees our chain. */
	FULL_BARRIER();
	/* Acquire, so that off_wrap is as new as the flags that give it a meaning. Pairs with the
	 * release of the flags there. */
	flags = LOAD_ACQUIRE(dq->packed.device->flags) & 3;
	if (flags == VRING_PACKED_EVENT_FLAG_DISABLE)
		return false;
	if (flags != VRING_PACKED_EVENT_FLAG_DESC || !dq->event_idx)
		return true; /* enabled, or nonsense, where one kick too many does no harm */
	asked = READ_ONCE(dq->packed.device->off_wrap);
	event = asked & ~VRING_PACKED_EVENT_WRAP;
	if (event >= dq->num)
		return true;
	/* Positions in a cycle of two laps, which the wrap counter tells apart: is the one asked
	 * for among the last `added`? */
	event += asked & VRING_PACKED_EVENT_WRAP ? 0 : dq->num;
	here = dq->avail + (dq->avail_wrap ? 0 : dq->num);
	return (here + 2 * cycle - event - 1) % cycle < added;
}

/* Is the slot used where the next used element is due? */
static bool look(struct driver_queue *dq)
{
	uint16_t flags;

	/* Pairs with the release of the flags in packed_flush(): element and buffers come after
	 * them. */
	flags = LOAD_ACQUIRE(dq->packed.desc[dq->last_used].flags);
	/* Where nothing is out, the zeros of a ring that starts in its second lap look used. */
	return (flags & USED_FLAGS) == flags_used(dq->used_wrap) && dq->num_free < dq->num;
}

/* Asks for a call for the element that comes next. */
static void arm_event(struct driver_queue *dq)
{
	WRITE_ONCE(dq->packed.driver->off_wrap, off_wrap(dq->last_used, dq->used_wrap));
	/* off_wrap before the flags that make it count. Pairs with the load of both, as one word,
	 * in packed_should_notify(). */
	STORE_RELEASE(dq->packed.driver->flags, VRING_PACKED_EVENT_FLAG_DESC);
	dq->event_armed = true;
	/* The wish before the last look. Pairs with the barrier in packed_should_notify(). */
	FULL_BARRIER();
}

static void release(struct driver_queue *dq, uint16_t id)
{
	uint32_t used = (uint32_t)dq->last_used + dq->slots[id].ndesc;

	if (used >= dq->num) {
		used -= dq->num;
		dq->used_wrap = !dq->used_wrap;
	}
	dq->last_used = (uint16_t)used;
	if (dq->in_order)
		return; /* ids follow the slots */
	dq->slots[id].next = dq->free_head;
	dq->free_head = id;
}

/* 1: the used element that is next, checked; 0: none; -1: broken. */
static int fetch(struct driver_queue *dq, uint16_t *id, uint32_t *len)
{
	const struct vring_packed_desc *d;

	if (unlikely(dq->report.fault))
		return -1;
	if (!look(dq)) {
		if (!dq->event_idx || dq->cb_off || dq->event_armed)
			return 0;
		/* Callbacks are on, so 0 promises a call for what comes next. */
		arm_event(dq);
		if (!look(dq))
			return 0;
	}
	d = &dq->packed.desc[dq->last_used];
	*id = READ_ONCE(d->id);
	/* Whether or not WRITE is set: without it `len` means nothing (2.8.4), but QEMU's devices
	 * never set it, and Linux' driver does not look. */
	*len = READ_ONCE(d->len);
	if (unlikely(*id >= dq->num))
		return driver_fault(dq, VQ_ID_RANGE, 0, *id, dq->num);
	if (unlikely(!dq->slots[*id].ndesc))
		return driver_fault(dq, VQ_USED_ID, *id, *id, 0);
	if (dq->in_order)
		driver_batch_open(dq, *id, *len);
	return 1;
}

int packed_get_buf(struct driver_queue *dq, uint64_t *token, uint32_t *written)
{
	uint16_t id = 0;
	uint32_t len = 0;

	if (!dq->batch_open) {
		int rc = fetch(dq, &id, &len);

		if (rc <= 0)
			return rc;
	}
	if (dq->in_order)
		id = driver_batch_next(dq, &len);
	release(dq, id);
	driver_complete(dq, id, len, token, written);
	return 1;
}

void packed_disable_cb(struct driver_queue *dq)
{
	if (dq->cb_off)
		return;
	dq->cb_off = true;
	dq->event_armed = false;
	/* A wish, so no order is needed. */
	WRITE_ONCE(dq->packed.driver->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
}

bool packed_enable_cb(struct driver_queue *dq)
{
	dq->cb_off = false;
	if (dq->event_idx) {
		arm_event(dq);
	} else {
		WRITE_ONCE(dq->packed.driver->flags, VRING_PACKED_EVENT_FLAG_ENABLE);
		/* The wish before the last look. Pairs with the barrier in packed_should_notify().
		 * */
		FULL_BARRIER();
	}
	return packed_more_used(dq);
}

bool packed_more_used(struct driver_queue *dq)
{
	return dq->batch_open || dq->report.fault || look(dq);
}
