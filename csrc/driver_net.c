/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Frames in and out of a network device's rings. The device is hostile: its lengths and the header
 * that it wrote are read once, and checked before they are used.
 */
#include "driver_net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "eventfd.h"

static int check(const struct driver_queue *dq, const struct net_slots *s, uint32_t hdr_len)
{
	if (hdr_len != NET_HDR_LEGACY && hdr_len != NET_HDR_MAX)
		return -EINVAL;
	if (!s->num || s->num > dq->num || s->size < hdr_len + NET_ETH_HDR)
		return -EINVAL;
	if (s->size % NET_SLOT_ALIGN || (uintptr_t)s->host % NET_SLOT_ALIGN)
		return -EINVAL;
	return 0;
}

static uint8_t *slot_at(const struct net_slots *s, uint32_t slot)
{
	return s->host + (size_t)slot * s->size;
}

static uint64_t slot_addr(const struct net_slots *s, uint32_t slot)
{
	return s->addr + (uint64_t)slot * s->size;
}

static int kick(struct driver_queue *dq, int fd)
{
	return virtqueue_kick_prepare(dq) ? eventfd_signal(fd) : 0;
}

/* ------------------------------------------------------------------ sending */

int net_tx_init(struct net_tx *tx, struct driver_queue *dq, const struct net_slots *slots,
		uint32_t hdr_len, int kick_fd)
{
	int rc = check(dq, slots, hdr_len);

	if (rc)
		return rc;
	*tx = (struct net_tx){ .dq = dq, .slots = *slots, .hdr_len = hdr_len, .kick = kick_fd };
	tx->free = malloc(slots->num * sizeof(*tx->free));
	if (!tx->free)
		return -ENOMEM;
	for (uint32_t i = 0; i < slots->num; i++)
		tx->free[i] = (uint16_t)(slots->num - 1 - i);
	tx->nfree = slots->num;
	virtqueue_disable_cb(dq);
	return 0;
}

void net_tx_destroy(struct net_tx *tx)
{
	free(tx->free);
	tx->free = NULL;
}

int net_tx_reap(struct net_tx *tx)
{
	uint64_t slot;
	uint32_t written;
	int rc;

	/* The ring gives back what was added, each once: the stack has room for it. */
	while ((rc = virtqueue_get_buf(tx->dq, &slot, &written)) > 0)
		tx->free[tx->nfree++] = (uint16_t)slot;
	return rc < 0 ? -EIO : 0;
}

static void put_header(const struct net_tx *tx, uint8_t *to, const struct net_header *header)
{
	if (header)
		memcpy(to, header, NET_HDR_LEGACY);
	else
		memset(to, 0, NET_HDR_LEGACY);
	if (tx->hdr_len > NET_HDR_LEGACY)
		memset(to + NET_HDR_LEGACY, 0, tx->hdr_len - NET_HDR_LEGACY);
}

static bool fits(const struct net_tx *tx, uint32_t len)
{
	return len >= NET_ETH_HDR && len <= net_tx_longest(tx);
}

static void stage(struct net_burst *b, const struct net_slots *slots, uint32_t slot, uint32_t len,
		  bool writable)
{
	b->bufs[b->n] = (struct virtqueue_buf){ slot_addr(slots, slot), len };
	b->reqs[b->n] = (struct virtqueue_request){
		.bufs = &b->bufs[b->n], .out = !writable, .in = writable, .token = slot
	};
	b->n++;
}

/* Each slot is out at most once, and there are no more than the ring has: only a broken ring takes fewer
 * than all. */
static int publish(struct driver_queue *dq, const struct net_burst *b)
{
	int rc = virtqueue_add_batch(dq, b->reqs, b->n);

	return rc == (int)b->n ? 0 : -EIO;
}

uint8_t *net_tx_stage(struct net_tx *tx, struct net_burst *b, const struct net_header *header,
		      uint32_t len)
{
	uint16_t slot;
	uint8_t *to;

	if (b->n == NET_BURST || b->n == tx->nfree || !fits(tx, len))
		return NULL;
	slot = tx->free[tx->nfree - 1 - b->n];
	to = slot_at(&tx->slots, slot);
	put_header(tx, to, header);
	stage(b, &tx->slots, slot, tx->hdr_len + len, false);
	return to + tx->hdr_len;
}

int net_tx_publish(struct net_tx *tx, struct net_burst *b)
{
	int rc = publish(tx->dq, b);

	if (rc)
		return rc;
	tx->nfree -= b->n;
	b->n = 0;
	return kick(tx->dq, tx->kick);
}

int net_tx_send(struct net_tx *tx, const struct net_out *frames, unsigned n)
{
	struct net_burst b = { .n = 0 };
	unsigned done = 0;
	int rc = 0;

	/* Reaped when it is worth it. */
	if (tx->nfree <= tx->slots.num / 2)
		rc = net_tx_reap(tx);
	while (!rc && done < n) {
		const struct net_out *f = &frames[done];
		uint8_t *to = net_tx_stage(tx, &b, f->header, f->len);

		if (to) {
			memcpy(to, f->data, f->len);
			done++;
		} else if (b.n) {
			rc = net_tx_publish(tx, &b);
		} else {
			break;
		}
	}
	if (!rc && b.n)
		rc = net_tx_publish(tx, &b);
	if (!rc && !done && n && tx->nfree)
		rc = -EMSGSIZE;
	return rc ? rc : (int)done;
}

/* ------------------------------------------------------------------ receiving */

static const char *const fault_texts[] = {
	[NET_OK] = "no fault",
	[NET_SHORT] = "fewer bytes than a frame with its header has",
	[NET_LONG] = "more bytes than the buffer has, or than any frame",
	[NET_BUFFERS] = "num_buffers beyond the buffers that were used with it",
	[NET_CSUM] = "csum_start and csum_offset point outside the frame",
};

const char *net_fault_text(enum net_fault fault)
{
	return fault_texts[fault];
}

int net_rx_init(struct net_rx *rx, struct driver_queue *dq, const struct net_slots *slots,
		uint32_t hdr_len, bool mergeable, int kick_fd)
{
	int rc = check(dq, slots, hdr_len);

	if (rc)
		return rc;
	if (mergeable && hdr_len != NET_HDR_MAX)
		return -EINVAL;
	*rx = (struct net_rx){ .dq = dq,
			       .slots = *slots,
			       .hdr_len = hdr_len,
			       .mergeable = mergeable,
			       .kick = kick_fd };
	rx->parts = malloc(slots->num * sizeof(*rx->parts));
	return rx->parts ? 0 : -ENOMEM;
}

void net_rx_destroy(struct net_rx *rx)
{
	free(rx->parts);
	rx->parts = NULL;
}

/* Gives all parts back to the device. */
static int repost(struct net_rx *rx)
{
	struct net_burst b;
	int rc = 0;

	for (uint32_t done = 0; !rc && done < rx->nparts; done += b.n) {
		for (b.n = 0; b.n < NET_BURST && done + b.n < rx->nparts;)
			stage(&b, &rx->slots, rx->parts[done + b.n].slot, rx->slots.size, true);
		rc = publish(rx->dq, &b);
	}
	if (!rc)
		rx->nparts = 0;
	return rc;
}

int net_rx_fill(struct net_rx *rx)
{
	if (rx->dq->num_free < rx->slots.num)
		return -EBUSY;
	for (uint32_t i = 0; i < rx->slots.num; i++)
		rx->parts[i].slot = (uint16_t)i;
	rx->nparts = rx->slots.num;
	return repost(rx);
}

int net_rx_release(struct net_rx *rx)
{
	int rc = repost(rx);

	return rc ? rc : kick(rx->dq, rx->kick);
}

static int set_fault(struct net_rx *rx, enum net_fault fault, uint64_t value, uint64_t limit)
{
	rx->fault = fault;
	rx->value = value;
	rx->limit = limit;
	rx->dropped++;
	return -EBADMSG;
}

/* Takes one buffer: 1, 0 (none came), -EIO, -EBADMSG. It is among the parts unless it is 0 or -EIO. */
static int take_part(struct net_rx *rx)
{
	uint64_t slot;
	uint32_t len;
	int rc = virtqueue_get_buf(rx->dq, &slot, &len);

	if (rc <= 0)
		return rc < 0 ? -EIO : 0;
	rx->parts[rx->nparts++] = (struct net_part){ (uint16_t)slot, len };
	if (unlikely(rx->dq->claimed > rx->slots.size))
		return set_fault(rx, NET_LONG, rx->dq->claimed, rx->slots.size);
	return 1;
}

/* Each word of what the device wrote is read once. */
static void read_header(const struct net_rx *rx, const struct net_part *part, struct net_header *h)
{
	const uint8_t *at = slot_at(&rx->slots, part->slot);
	const uint32_t *words = (const uint32_t *)at;
	uint32_t copy[3] = { READ_ONCE(words[0]), READ_ONCE(words[1]), 0 };

	if (rx->hdr_len == NET_HDR_MAX)
		copy[2] = READ_ONCE(words[2]);
	else
		copy[2] = READ_ONCE(*(const uint16_t *)(at + 8));
	memcpy(h, copy, sizeof(*h));
}

/* One frame, of all its buffers. Results as take_part(). */
static int take_frame(struct net_rx *rx, struct net_in *f)
{
	uint32_t buffers = 1;
	uint64_t total, end;
	int rc;

	f->first = rx->nparts;
	rc = take_part(rx);
	if (rc <= 0)
		return rc;
	total = rx->parts[f->first].len;
	if (unlikely(total < rx->hdr_len + NET_ETH_HDR))
		return set_fault(rx, NET_SHORT, total, rx->hdr_len + NET_ETH_HDR);
	read_header(rx, &rx->parts[f->first], &f->header);
	if (rx->mergeable && f->header.num_buffers > 1) /* some write 0 for a frame in one buffer */
		buffers = f->header.num_buffers;
	if (unlikely(buffers > rx->slots.num - f->first)) /* more than we have with the device */
		return set_fault(rx, NET_BUFFERS, buffers, rx->slots.num - f->first);
	while (rx->nparts - f->first < buffers) {
		rc = take_part(rx);
		/* A device publishes a frame's buffers together (5.1.6.4). */
		if (rc == 0)
			return set_fault(rx, NET_BUFFERS, buffers, rx->nparts - f->first);
		if (rc < 0)
			return rc;
		total += rx->parts[rx->nparts - 1].len;
	}
	if (unlikely(total > UINT32_MAX)) /* so many buffers, of such a size */
		return set_fault(rx, NET_LONG, total, UINT32_MAX);
	f->nparts = buffers;
	f->len = (uint32_t)(total - rx->hdr_len);
	end = (uint64_t)f->header.csum_start + f->header.csum_offset + 2;
	if (unlikely(f->header.flags & NET_HDR_F_NEEDS_CSUM && end > f->len))
		return set_fault(rx, NET_CSUM, end, f->len);
	return 1;
}

int net_rx_take(struct net_rx *rx, struct net_in *frames, unsigned n)
{
	unsigned done = 0;
	int rc = 1;

	if (unlikely(rx->pending)) {
		rx->pending = false;
		return -EBADMSG;
	}
	while (done < n && (rc = take_frame(rx, &frames[done])) > 0)
		done++;
	if (!done)
		return rc < 0 ? rc : 0;
	rx->pending = rc == -EBADMSG;
	return (int)done;
}

void net_rx_copy(const struct net_rx *rx, const struct net_in *frame, uint8_t *to)
{
	const struct net_part *part = &rx->parts[frame->first];
	uint32_t skip = rx->hdr_len;

	for (uint32_t i = 0; i < frame->nparts; i++, part++) {
		memcpy(to, slot_at(&rx->slots, part->slot) + skip, part->len - skip);
		to += part->len - skip;
		skip = 0;
	}
}
