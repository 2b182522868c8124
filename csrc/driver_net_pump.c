/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Generators and counters of frames: as fast as a ring takes or gives them. Waits on the call eventfd
 * when there is nothing to do.
 */
#define _GNU_SOURCE /* ppoll */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "driver_net.h"

static int64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* 1: look at the ring; 0: the time is over; or what a system call failed with. Callbacks are on then. */
static int wait_used(struct driver_queue *dq, int call, int64_t until)
{
	struct pollfd p = { .fd = call, .events = POLLIN };
	int64_t left = until - now();
	struct timespec ts = { left / 1000000000, left % 1000000000 };
	uint64_t count;

	if (left <= 0)
		return 0;
	if (virtqueue_enable_cb(dq))
		return 1;
	if (ppoll(&p, 1, &ts, NULL) < 0)
		return -errno;
	if (p.revents & POLLIN && read(call, &count, sizeof(count)) < 0 && errno != EAGAIN)
		return -errno;
	return 1;
}

static void put_seq(uint8_t *at, uint64_t seq)
{
	memcpy(at, &seq, NET_SEQ); /* little-endian, as vring.h asserts */
}

/* One burst: 1, 0 (no room), or negative. */
static int send_some(struct net_tx *tx, struct net_pump *p)
{
	struct net_burst b = { .n = 0 };
	uint8_t *to;
	int rc;

	while (b.n < p->count && (to = net_tx_stage(tx, &b, NULL, p->len))) {
		memcpy(to, p->frame, p->len);
		if (p->seq_at >= 0)
			put_seq(to + p->seq_at, p->seq + b.n);
	}
	if (!b.n)
		return 0;
	p->seq += b.n;
	p->count -= b.n;
	p->frames += b.n;
	rc = net_tx_publish(tx, &b);
	return rc ? rc : 1;
}

static bool is_sound(const struct net_pump *p, uint32_t longest)
{
	if (p->len < NET_ETH_HDR || p->len > longest)
		return false;
	return p->seq_at < 0 || (uint64_t)p->seq_at + NET_SEQ <= p->len;
}

int net_tx_pump(struct net_tx *tx, struct net_pump *p, int call, int64_t until)
{
	int rc = is_sound(p, net_tx_longest(tx)) ? 0 : -EMSGSIZE;

	while (!rc && p->count) {
		if (tx->nfree <= tx->slots.num / 2 && (rc = net_tx_reap(tx)))
			break;
		rc = send_some(tx, p);
		if (!rc) {
			rc = wait_used(tx->dq, call, until);
			virtqueue_disable_cb(tx->dq);
		} else if (rc > 0 && now() >= until) {
			break;
		}
		if (!rc)
			break;
		rc = rc > 0 ? 0 : rc;
	}
	return rc < 0 ? rc : 0;
}

/* Is it the frame that is expected, its sequence number aside? */
static bool matches(const struct net_rx *rx, const struct net_in *f, const struct net_pump *p,
		    uint64_t *seq)
{
	const struct net_part *part = &rx->parts[f->first];
	uint32_t skip = rx->hdr_len, at = 0;
	uint32_t from = p->seq_at < 0 ? p->len : (uint32_t)p->seq_at;
	uint32_t to = p->seq_at < 0 ? p->len : from + NET_SEQ;

	if (f->len != p->len)
		return false;
	for (uint32_t i = 0; i < f->nparts; i++, part++) {
		const uint8_t *data = rx->slots.host + (size_t)part->slot * rx->slots.size + skip;
		uint32_t n = part->len - skip, end = at + n;
		uint32_t before = end < from ? end : from, after = at > to ? at : to;

		if (at < before && memcmp(data, p->frame + at, before - at))
			return false;
		if (after < end && memcmp(data + (after - at), p->frame + after, end - after))
			return false;
		before = at > from ? at : from;
		after = end < to ? end : to;
		if (before < after)
			memcpy((uint8_t *)seq + (before - from), data + (before - at), after - before);
		at = end;
		skip = 0;
	}
	return true;
}

static void count_frame(const struct net_rx *rx, const struct net_in *f, struct net_pump *p)
{
	uint64_t seq = 0;

	if (!matches(rx, f, p, &seq)) {
		p->others++;
		return;
	}
	if (p->count)
		p->count--;
	p->frames++;
	if (p->seq_at < 0)
		return;
	if (seq < p->seq) {
		p->repeated++;
		return;
	}
	p->lost += seq - p->seq;
	p->seq = seq + 1;
}

int net_rx_pump(struct net_rx *rx, struct net_pump *p, int call, int64_t until)
{
	struct net_in frames[NET_BURST];
	int rc = is_sound(p, UINT32_MAX) ? 0 : -EMSGSIZE;

	while (rc >= 0 && p->count) {
		unsigned most = p->count < NET_BURST ? (unsigned)p->count : NET_BURST;
		int n = net_rx_take(rx, frames, most);

		for (int i = 0; i < n; i++)
			count_frame(rx, &frames[i], p);
		rc = net_rx_release(rx);
		if (n < 0)
			return n;
		if (rc)
			return rc;
		if (n ? now() >= until : !(rc = wait_used(rx->dq, call, until)))
			return 0;
	}
	return rc < 0 ? rc : 0;
}
