// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The driver's side of the benchmark, never timed, and the floor: the least that a device can do
 * with a ring whose driver it trusts blindly. Knows the wire format, nothing of csrc's functions.
 */
#include "ring_floor.h"

#include <stdlib.h>
#include <sys/uio.h>

#include "barrier.h"

#define FLOOR_IOVS 8

struct ring_bench *ring_new(bool packed, uint32_t num, uint8_t *desc, uint8_t *avail, uint8_t *used,
			    const struct guest_region *regions, uint32_t nregions, uint32_t shift,
			    uint64_t small, const uint64_t *data, uint32_t ndata)
{
	struct ring_bench *r = calloc(1, sizeof(*r));

	r->packed = packed;
	r->num = num;
	r->desc = desc;
	r->avail = avail;
	r->used = used;
	r->guest_base = regions[0].guest_addr;
	r->shift = shift;
	r->nregions = nregions;
	r->regions = calloc(nregions, sizeof(*regions));
	for (uint32_t i = 0; i < nregions; i++)
		r->regions[i] = regions[i];
	r->small = small;
	r->data = data;
	r->ndata = ndata;
	r->publish_at = calloc(num, sizeof(*r->publish_at));
	r->publish = calloc(num, sizeof(*r->publish));
	r->avail_wrap = r->wrap = true;
	for (uint32_t c = 0; c < num / RING_CHAIN; c++) {
		/* struct virtio_blk_req: IN, no ioprio, sector; then the status byte */
		uint64_t *header = (uint64_t *)(regions[0].host + (small - r->guest_base) +
						c * RING_CHAIN_BYTES);

		header[0] = 0;
		header[1] = c * 8;
	}
	return r;
}

void ring_delete(struct ring_bench *r)
{
	free(r->publish);
	free(r->publish_at);
	free(r->regions);
	free(r);
}

uint32_t *ring_publish_at(struct ring_bench *r)
{
	return r->publish_at;
}

uint16_t *ring_publish_values(struct ring_bench *r)
{
	return r->publish;
}

/* ------------------------------------------------------------------ driver */

static void chain_buffers(struct ring_bench *r, uint32_t c, uint64_t addr[3])
{
	addr[0] = r->small + c * RING_CHAIN_BYTES;
	addr[1] = r->data[r->next_data];
	addr[2] = addr[0] + RING_HEADER;
	r->next_data = (r->next_data + 1) % r->ndata;
	r->regions[0].host[addr[2] - r->guest_base] = RING_STATUS_UNSET;
}

static const uint32_t lengths[3] = {RING_HEADER, RING_DATA, 1};
static const uint16_t kinds[3] = {
	VRING_DESC_F_NEXT,
	VRING_DESC_F_NEXT | VRING_DESC_F_WRITE,
	VRING_DESC_F_WRITE,
};

static void refill_split(struct ring_bench *r, uint32_t batch)
{
	struct vring_desc *desc = (struct vring_desc *)r->desc;
	struct vring_avail *avail = (struct vring_avail *)r->avail;
	uint64_t addr[3];

	r->start = r->next_chain;
	/* An index just passed: the device decides, and does not notify. */
	avail->ring[r->num] = (uint16_t)(r->avail_idx - 1);
	for (uint32_t i = 0; i < r->chains; i++) {
		uint32_t c = r->next_chain;

		chain_buffers(r, c, addr);
		for (uint32_t d = 0; d < RING_CHAIN; d++)
			desc[c * RING_CHAIN + d] = (struct vring_desc){
				addr[d], lengths[d], kinds[d],
				(uint16_t)(d + 1 < RING_CHAIN ? c * RING_CHAIN + d + 1 : 0)};
		avail->ring[r->avail_idx++ % r->num] = (uint16_t)(c * RING_CHAIN);
		r->next_chain = (c + 1) % (r->num / RING_CHAIN);
		if ((i + 1) % batch == 0) {
			r->publish_at[r->batches] = 1; /* avail->idx */
			r->publish[r->batches++] = r->avail_idx;
		}
	}
}

static void refill_packed(struct ring_bench *r, uint32_t batch)
{
	struct vring_packed_desc *desc = (struct vring_packed_desc *)r->desc;
	struct vring_packed_desc_event *event = (struct vring_packed_desc_event *)r->avail;
	uint64_t addr[3];

	r->start = r->avail_idx;
	r->start_wrap = r->avail_wrap;
	/* The slot before this round's first: passed, so the device decides not to notify. */
	if (r->avail_idx)
		event->off_wrap = (uint16_t)((r->avail_idx - 1) | (r->avail_wrap << 15));
	else
		event->off_wrap = (uint16_t)((r->num - 1) | (!r->avail_wrap << 15));
	event->flags = VRING_PACKED_EVENT_FLAG_DESC;
	for (uint32_t i = 0; i < r->chains; i++) {
		chain_buffers(r, i, addr);
		for (uint32_t d = 0; d < RING_CHAIN; d++) {
			uint16_t mine = r->avail_wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED;
			uint16_t not_yet = r->avail_wrap ? 0 : VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;
			bool first = !d && i % batch == 0;

			/* Only the first head of a batch is held back: the device stops there. */
			desc[r->avail_idx] = (struct vring_packed_desc){
				addr[d], lengths[d], (uint16_t)i,
				(uint16_t)(kinds[d] | (first ? not_yet : mine))};
			if (first) {
				r->publish_at[r->batches] = r->avail_idx * 8u + 7; /* desc.flags */
				r->publish[r->batches++] = kinds[d] | mine;
			}
			if (++r->avail_idx == r->num) {
				r->avail_idx = 0;
				r->avail_wrap = !r->avail_wrap;
			}
		}
	}
}

/* Lay out `chains` chains, to be published `batch` by batch. All of the last round must be back. */
void ring_refill(struct ring_bench *r, uint32_t chains, uint32_t batch)
{
	r->chains = chains;
	r->batches = 0;
	if (r->packed)
		refill_packed(r, batch);
	else
		refill_split(r, batch);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* How many chains of the round came back as they must; `status`: the status byte, too. */
uint32_t ring_check(struct ring_bench *r, bool status)
{
	uint32_t good = 0;

	for (uint32_t i = 0; i < r->chains; i++) {
		uint32_t c = r->packed ? i : (r->start + i) % (r->num / RING_CHAIN);
		bool ok;

		if (r->packed) {
			uint32_t at = r->start + i * RING_CHAIN;
			bool wrap = at < r->num ? r->start_wrap : !r->start_wrap;
			struct vring_packed_desc *d = (struct vring_packed_desc *)r->desc + at % r->num;
			uint16_t bits = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;

			ok = d->id == c && d->len == RING_WRITTEN && (d->flags & bits) == (wrap ? bits : 0);
		} else {
			struct vring_used *used = (struct vring_used *)r->used;
			uint16_t at = (uint16_t)(r->avail_idx - r->chains + i);
			struct vring_used_elem *e = &used->ring[at % r->num];

			ok = used->idx == r->avail_idx && e->id == c * RING_CHAIN && e->len == RING_WRITTEN;
		}
		if (status)
			ok &= !r->regions[0].host[r->small - r->guest_base + c * RING_CHAIN_BYTES + RING_HEADER];
		good += ok;
	}
	return good;
}

/* ------------------------------------------------------------------ the floor */

static inline void *floor_at(const struct ring_bench *r, uint64_t addr, bool one)
{
	uint64_t off = addr - r->guest_base;

	if (one)
		return r->regions[0].host + off;
	return r->regions[off >> r->shift].host + (off & ((1ull << r->shift) - 1));
}

static inline __attribute__((always_inline)) void floor_split(struct ring_bench *r, bool one)
{
	const struct vring_desc *desc = (const struct vring_desc *)r->desc;
	struct vring_avail *avail = (struct vring_avail *)r->avail;
	struct vring_used *used = (struct vring_used *)r->used;
	uint16_t mask = (uint16_t)(r->num - 1), last = r->last_avail, old = last;
	struct iovec iov[FLOOR_IOVS];

	for (uint16_t end; (end = LOAD_ACQUIRE(avail->idx)) != last;) {
		for (; last != end; last++) {
			uint16_t head = avail->ring[last & mask];
			const struct vring_desc *d = &desc[head];
			uint32_t n = 0;

			for (;; d = &desc[d->next]) {
				iov[n].iov_base = floor_at(r, d->addr, one);
				iov[n++].iov_len = d->len;
				if (!(d->flags & VRING_DESC_F_NEXT))
					break;
			}
			ring_consume(iov);
			used->ring[last & mask] = (struct vring_used_elem){head, RING_WRITTEN};
		}
	}
	STORE_RELEASE(used->idx, last);
	FULL_BARRIER();
	r->notified += (uint64_t)vring_need_event(READ_ONCE(avail->ring[r->num]), last, old);
	r->last_avail = last;
}

static inline __attribute__((always_inline)) void floor_packed(struct ring_bench *r, bool one)
{
	struct vring_packed_desc *desc = (struct vring_packed_desc *)r->desc;
	struct vring_packed_desc_event *driver = (struct vring_packed_desc_event *)r->avail;
	uint16_t at = r->last_avail, old = at, event;
	struct iovec iov[FLOOR_IOVS];
	bool wrap = r->wrap;

	for (;;) {
		uint16_t flags = LOAD_ACQUIRE(desc[at].flags), first = at, id;
		uint16_t used = wrap ? VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED : 0;
		uint32_t n = 0;

		if (!(flags & VRING_PACKED_DESC_F_AVAIL) == wrap || !(flags & VRING_PACKED_DESC_F_USED) != wrap)
			break;
		for (;; flags = desc[at].flags) {
			iov[n].iov_base = floor_at(r, desc[at].addr, one);
			iov[n++].iov_len = desc[at].len;
			id = desc[at].id;
			if (++at == r->num) {
				at = 0;
				wrap = !wrap;
			}
			if (!(flags & VRING_DESC_F_NEXT))
				break;
		}
		ring_consume(iov);
		desc[first].id = id;
		desc[first].len = RING_WRITTEN;
		STORE_RELEASE(desc[first].flags, used);
	}
	FULL_BARRIER();
	event = READ_ONCE(driver->off_wrap);
	if (READ_ONCE(driver->flags) == VRING_PACKED_EVENT_FLAG_DESC) {
		uint16_t off = event & 0x7fff;

		if (!(event >> 15) == wrap)
			off = (uint16_t)(off - r->num);
		if (old > at)
			old = (uint16_t)(old - r->num);
		r->notified += (uint64_t)vring_need_event(off, at, old);
	}
	r->last_avail = at;
	r->wrap = wrap;
}

/* ns for `rounds` rounds of `chains` chains, laid out before the clock starts; `serve` is called once a batch. */
uint64_t ring_run(struct ring_bench *r, ring_device *serve, void *device, uint32_t rounds, uint32_t chains,
		  uint32_t batch)
{
	uint64_t total = 0;

	while (rounds--) {
		uint64_t start;

		ring_refill(r, chains, batch);
		start = ring_clock();
		for (uint32_t b = 0; b < r->batches; b++) {
			ring_publish(r, b);
			serve(device);
		}
		total += ring_clock() - start;
	}
	return total;
}

static void nothing(void *r)
{
	ring_consume(r);
}

static void split_one(void *r)
{
	floor_split(r, true);
}

static void split_many(void *r)
{
	floor_split(r, false);
}

static void packed_one(void *r)
{
	floor_packed(r, true);
}

static void packed_many(void *r)
{
	floor_packed(r, false);
}

/* As ring_run(), of the floor's device, or of what all devices have in common: clock and publishing alone. */
uint64_t ring_floor_run(struct ring_bench *r, bool device, uint32_t rounds, uint32_t chains, uint32_t batch)
{
	ring_device *many = r->packed ? packed_many : split_many;
	ring_device *one = r->packed ? packed_one : split_one;

	return ring_run(r, !device ? nothing : r->nregions == 1 ? one : many, r, rounds, chains, batch);
}
