/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The driver's side of a split virtqueue (VIRTIO 1.2, 2.7). Knows the ring in shared memory and the
 * driver's private slots; knows neither whose memory the buffers are nor how anybody is signalled.
 *
 * The device may be hostile and can write all of the ring: nothing that the driver relies on is
 * read back from there. Chains and free descriptors are linked in `slots`; the used ring alone is
 * read, each field once.
 */
#include "driver_impl.h"
#include "ring_impl.h"

static inline uint16_t *used_event(struct driver_queue *dq)
{
	return &dq->split.avail->ring[dq->num];
}

static inline uint16_t *avail_event(struct driver_queue *dq)
{
	return (uint16_t *)&dq->split.used->ring[dq->num];
}

int split_driver_init(struct driver_queue *dq, const struct driver_config *cfg)
{
	if (cfg->base > UINT16_MAX)
		return -EINVAL;
	dq->split.desc = cfg->areas.desc;
	dq->split.avail = cfg->areas.avail;
	dq->split.used = cfg->areas.used;
	memset(dq->split.desc, 0, vring_desc_size(dq->num));
	memset(dq->split.avail, 0, vring_driver_size(dq->num, 0));
	memset(dq->split.used, 0, vring_device_size(dq->num, 0));

	dq->avail = dq->last_used = dq->shadow_used = (uint16_t)cfg->base;
	dq->free_head = dq->oldest = 0;
	/* Also the device's index: a device that starts takes its own from there, whatever base it
	 * was told. */
	WRITE_ONCE(dq->split.used->idx, dq->last_used);
	WRITE_ONCE(dq->split.avail->idx, dq->avail);
	WRITE_ONCE(*used_event(dq), dq->last_used);
	dq->event_armed = true;

	/* A circle: with IN_ORDER descriptors must be taken in ring order (2.7.5), and since they
	 * come back in that order too, the circle never needs relinking. Without, it is a list that
	 * num_free ends. */
	for (uint32_t i = 0; i < dq->num; i++)
		dq->slots[i].next = (uint16_t)((i + 1) & (dq->num - 1));
	return 0;
}

uint32_t split_driver_base(const struct driver_queue *dq)
{
	return dq->avail;
}

uint32_t split_driver_resume_base(const struct driver_queue *dq)
{
	return READ_ONCE(dq->split.used->idx);
}

static void put_desc(struct vring_desc *d, const struct virtqueue_buf *b, uint16_t flags,
		     uint16_t next)
{
	d->addr = b->addr;
	d->len = b->len;
	d->flags = flags;
	d->next = next;
}

static void put_table(struct driver_queue *dq, uint16_t head, const struct virtqueue_request *req)
{
	struct vring_desc *table = driver_indirect_table(dq, head);
	uint32_t n = req->out + req->in;
	struct virtqueue_buf b = { driver_indirect_addr(dq, head), n * 16 };

	for (uint32_t i = 0; i < n; i++) {
		uint16_t flags = i < req->out ? 0 : VRING_DESC_F_WRITE;
		bool more = i + 1 < n;

		put_desc(&table[i], &req->bufs[i], flags | (more ? VRING_DESC_F_NEXT : 0),
			 more ? (uint16_t)(i + 1) : 0);
	}
	put_desc(&dq->split.desc[head], &b, VRING_DESC_F_INDIRECT, 0);
}

/* Lays one chain out and enters it `index` into the avail ring, where the device does not look
 * before publish(). */
static int stage(struct driver_queue *dq, const struct virtqueue_request *req, uint16_t index)
{
	uint16_t head = dq->free_head, last = head;
	uint32_t n = req->out + req->in, in_len;
	int slots = driver_request_slots(dq, req, &in_len);

	if (unlikely(slots < 0))
		return slots;
	if ((uint32_t)slots < n) {
		put_table(dq, head, req);
	} else {
		uint16_t next = head;

		for (uint32_t i = 0; i < n; i++) {
			uint16_t flags = i < req->out ? 0 : VRING_DESC_F_WRITE;
			bool more = i + 1 < n;

			last = next;
			next = dq->slots[last].next;
			put_desc(&dq->split.desc[last], &req->bufs[i],
				 flags | (more ? VRING_DESC_F_NEXT : 0), more ? next : 0);
		}
	}
	dq->free_head = dq->slots[last].next;
	dq->num_free -= (uint32_t)slots;

	struct driver_slot *slot = &dq->slots[head];

	slot->token = req->token;
	slot->in_len = in_len;
	slot->ndesc = (uint16_t)slots;
	slot->last = last;
	slot->index = index;
	WRITE_ONCE(dq->split.avail->ring[index & (dq->num - 1)], head);
	return head;
}

static void publish(struct driver_queue *dq, uint16_t n)
{
	dq->avail += n;
	driver_count_added(dq, n);
	/* Descriptors, tables, avail entries and the buffers' contents before the index. Pairs with
	 * the acquire of avail.idx in split_available(). */
	STORE_RELEASE(dq->split.avail->idx, dq->avail);
}

int split_add(struct driver_queue *dq, const struct virtqueue_request *req)
{
	int id = stage(dq, req, dq->avail);

	if (likely(id >= 0))
		publish(dq, 1);
	return id;
}

int split_add_batch(struct driver_queue *dq, const struct virtqueue_request *reqs, unsigned n)
{
	unsigned i;
	int rc = 0;

	for (i = 0; i < n; i++) {
		rc = stage(dq, &reqs[i], (uint16_t)(dq->avail + i));
		if (rc < 0)
			break;
	}
	if (!i)
		return rc;
	publish(dq, (uint16_t)i);
	return (int)i;
}

bool split_kick_prepare(struct driver_queue *dq)
{
	uint32_t added = dq->added;
	uint16_t event;

	if (!added)
		return false;
	dq->added = 0;
	/* The index before the look at what the device asks for. Pairs with the barrier in
	 * split_enable_notification(): either we see its wish or it sees our index. */
	FULL_BARRIER();
	if (!dq->event_idx)
		return !(READ_ONCE(dq->split.used->flags) & VRING_USED_F_NO_NOTIFY);
	event = READ_ONCE(*avail_event(dq));
	/* vring_need_event(), but with the count itself: a caller who rarely asks may have added
	 * more than 16 bits can tell from none. */
	return (uint16_t)(dq->avail - event - 1) < added;
}

/* Takes used.idx over. False: nothing new, or a fault. */
static bool look(struct driver_queue *dq)
{
	/* Pairs with the release of used.idx in split_flush(): elements and buffers come after it.
	 * */
	uint16_t idx = LOAD_ACQUIRE(dq->split.used->idx);
	uint16_t ahead = (uint16_t)(idx - dq->last_used);
	uint16_t out = (uint16_t)(dq->avail - dq->last_used);

	if (unlikely(ahead > out)) {
		driver_fault(dq, VQ_USED_JUMP, 0, ahead, (uint64_t)out + 1);
		return false;
	}
	dq->shadow_used = idx;
	return ahead != 0;
}

/* Asks for a call for the element that comes next. */
static void arm_event(struct driver_queue *dq)
{
	WRITE_ONCE(*used_event(dq), dq->last_used);
	dq->event_armed = true;
	/* The wish before the last look. Pairs with the barrier in split_should_notify(). */
	FULL_BARRIER();
}

static void release(struct driver_queue *dq, uint16_t id)
{
	dq->last_used++;
	if (dq->in_order)
		return; /* next in the circle as it is */
	dq->slots[dq->slots[id].last].next = dq->free_head;
	dq->free_head = id;
}

/* 1: the used element that is next, checked; 0: none; -1: broken. */
static int fetch(struct driver_queue *dq, uint16_t *id, uint32_t *len)
{
	const struct vring_used_elem *elem;
	uint32_t used_id;

	if (unlikely(dq->report.fault))
		return -1;
	if (dq->last_used == dq->shadow_used && !look(dq)) {
		if (unlikely(dq->report.fault))
			return -1;
		if (!dq->event_idx || dq->cb_off || dq->event_armed)
			return 0;
		/* Callbacks are on, so 0 promises a call for what comes next. */
		arm_event(dq);
		if (!look(dq))
			return dq->report.fault ? -1 : 0;
	}
	elem = &dq->split.used->ring[dq->last_used & (dq->num - 1)];
	used_id = READ_ONCE(elem->id);
	*len = READ_ONCE(elem->len);
	if (unlikely(used_id >= dq->num))
		return driver_fault(dq, VQ_ID_RANGE, 0, used_id, dq->num);
	*id = (uint16_t)used_id;
	if (unlikely(!dq->slots[*id].ndesc))
		return driver_fault(dq, VQ_USED_ID, *id, used_id, 0);
	if (dq->in_order) {
		/* The index must cover the whole batch: it moves by the batch's size (2.7.9). */
		uint16_t before = (uint16_t)(dq->slots[*id].index - dq->last_used);
		uint16_t ahead = (uint16_t)(dq->shadow_used - dq->last_used);

		if (unlikely(before >= ahead))
			return driver_fault(dq, VQ_USED_BATCH, *id, before, ahead);
		driver_batch_open(dq, *id, *len);
	}
	return 1;
}

int split_get_buf(struct driver_queue *dq, uint64_t *token, uint32_t *written)
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

void split_disable_cb(struct driver_queue *dq)
{
	if (dq->cb_off)
		return;
	dq->cb_off = true;
	dq->event_armed = false;
	/* A wish of either kind, so no order is needed. With EVENT_IDX flags stay 0 (2.7.7.1), and
	 * the index just behind us is as far ahead as 16 bits go. */
	if (dq->event_idx)
		WRITE_ONCE(*used_event(dq), (uint16_t)(dq->last_used - 1));
	else
		WRITE_ONCE(dq->split.avail->flags, VRING_AVAIL_F_NO_INTERRUPT);
}

bool split_enable_cb(struct driver_queue *dq)
{
	dq->cb_off = false;
	if (dq->event_idx) {
		arm_event(dq);
	} else {
		WRITE_ONCE(dq->split.avail->flags, 0);
		/* The wish before the last look. Pairs with the barrier in split_should_notify().
		 * */
		FULL_BARRIER();
	}
	return split_more_used(dq);
}

bool split_more_used(struct driver_queue *dq)
{
	/* The rest of an open batch lies before shadow_used. */
	return dq->report.fault || dq->last_used != dq->shadow_used ||
	       dq->last_used != READ_ONCE(dq->split.used->idx);
}
