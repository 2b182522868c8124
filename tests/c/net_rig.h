/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A pair of a network device's queues, both drivers of which are played by hand (device_rig.h), and whose worker
 * has no thread: a test says when it serves. Frames are sent from and received into regions of the two rigs.
 */
#ifndef VHOST_TEST_NET_RIG_H
#define VHOST_TEST_NET_RIG_H

#include "device_rig.h"
#include "engine_net.h"

#define HDR NET_HDR_MAX
#define HOLE 0x40000u /* a guest address where nothing is */

static const int no_repairs;

struct net_rig {
	struct engine engine;
	struct engine_worker *worker; /* of which there is one */
	struct net_pair pair;
	struct rig tx, rx;
	struct net_queue txq, rxq;
};

static inline void net_rig_attach(struct net_rig *n, struct net_queue *q, struct rig *r, const struct engine_ops *ops)
{
	memset(q, 0, sizeof(*q));
	q->pair = &n->pair;
	q->engine.vq = &r->vq;
	q->engine.ops = ops;
	q->engine.owner = &n->engine;
	q->engine.kick = q->engine.source = q->engine.call.fd = -1;
}

/* An echo, with room for what was negotiated last: everything. */
static inline void net_rig_init(struct net_rig *n, struct options o)
{
	memset(n, 0, sizeof(*n));
	CHECK_EQ(engine_init(&n->engine, 1, "net", &no_repairs, NULL), 0);
	n->worker = n->engine.workers;
	CHECK_EQ(net_pair_init(&n->pair), 0);
	rig_init(&n->tx, o);
	rig_init(&n->rx, o);
	n->tx.vq.read_only = true;
	n->pair.wire = &net_wire_peer;
	n->pair.peer = &n->pair;
	n->pair.rules = (struct net_frame_rules){ .hdr_len = HDR, .longest = 1518 };
	n->pair.rx.hdr_len = HDR;
	n->pair.rx.longest = 1518;
	n->pair.rx.mergeable = true;
	net_rig_attach(n, &n->txq, &n->tx, &net_transmit_ops);
	net_rig_attach(n, &n->rxq, &n->rx, &net_receive_ops);
	net_receive_ops.begin(&n->rxq.engine);
}

/* Whatever was done: nothing is out that a device has no more use for. */
static inline void net_rig_destroy(struct net_rig *n)
{
	n->rxq.engine.leaving = true;
	net_receive_ops.settle(&n->rxq.engine);
	CHECK_EQ(n->tx.vq.inuse, 0);
	CHECK_EQ(n->rx.vq.inuse, 0);
	rig_destroy(&n->tx);
	rig_destroy(&n->rx);
	net_pair_destroy(&n->pair);
	engine_destroy(&n->engine);
}

static inline bool serve_rx(struct net_rig *n)
{
	return !n->rxq.engine.failed && net_receive_ops.serve(n->worker, &n->rxq.engine);
}

static inline bool serve_tx(struct net_rig *n)
{
	return !n->txq.engine.failed && net_transmit_ops.serve(n->worker, &n->txq.engine);
}

static inline void serve(struct net_rig *n)
{
	while (serve_tx(n))
		;
}

static inline uint64_t dropped(const struct net_rig *n)
{
	uint64_t sum = 0;

	for (int i = 0; i < NET_DROPS; i++)
		sum += n->pair.counters.dropped[i];
	return sum;
}

/* Guest addresses of the first two regions, which touch each other, as one. */
static inline uint8_t *ram(const struct rig *r, uint64_t addr)
{
	uint64_t off = addr - region_addr[0];

	CHECK(off < 2 * REGION_SIZE);
	return off < REGION_SIZE ? r->host[0] + off : r->host[1] + off - REGION_SIZE;
}

static inline void put_ram(const struct rig *r, uint64_t addr, const void *from, uint32_t len)
{
	for (uint32_t i = 0; i < len; i++)
		*ram(r, addr + i) = ((const uint8_t *)from)[i];
}

static inline void get_ram(const struct rig *r, uint64_t addr, void *to, uint32_t len)
{
	for (uint32_t i = 0; i < len; i++)
		((uint8_t *)to)[i] = *ram(r, addr + i);
}

/* A header and a frame of so many bytes that tells one from another. */
static inline uint32_t make_frame(uint8_t *to, struct net_header h, uint32_t hdr_len, uint32_t len)
{
	memcpy(to, &h, hdr_len);
	for (uint32_t i = 0; i < len; i++)
		to[hdr_len + i] = (uint8_t)rnd(256);
	return hdr_len + len;
}

/* The same chain behind an indirect descriptor, in a table that lies in the third region. */
static inline int add_indirect(struct rig *r, const struct piece *p, unsigned n)
{
	struct piece one = { region_addr[2], n * (uint32_t)sizeof(struct vring_desc), I };

	CHECK(one.len <= REGION_SIZE);
	if (r->o.packed) {
		struct vring_packed_desc *table = (void *)r->host[2];

		for (unsigned i = 0; i < n; i++)
			table[i] = (struct vring_packed_desc){ p[i].addr, p[i].len, 0, p[i].flags };
	} else {
		struct vring_desc *table = (void *)r->host[2];

		for (unsigned i = 0; i < n; i++)
			table[i] = (struct vring_desc){ p[i].addr, p[i].len, p[i].flags | (i + 1 < n ? N : 0),
							i + 1 };
	}
	return rig_add(r, &one, 1);
}

#endif
