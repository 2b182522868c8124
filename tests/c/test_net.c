/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What the network engine makes of chains: every layout of a frame, on either side, and chains that no honest
 * driver makes. Whatever comes, its head is given back, and what was dropped is counted by its reason. The
 * engine's threads are test_engine_net.c's.
 */
#include "net_rig.h"

static const struct options kinds[] = {
	{ .num = 64, .indirect = true },
	{ .num = 64, .indirect = true, .event_idx = true },
	{ .num = 61, .packed = true, .indirect = true },
	{ .num = 64, .indirect = true, .in_order = true },
	{ .num = 61, .packed = true, .indirect = true, .in_order = true },
};

static const char *const kind_names[] = { "split", "event_idx", "packed", "split in order", "packed in order" };

#define FOR_EACH_KIND(k)                                                                           \
	for (unsigned k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++)                            \
		if ((check_context = kind_names[k]))

#define TX 0x10000u /* where a frame is sent from ... */
#define RX 0x10000u /* ... and where it is received, in the other rig */

/* Both queues' buffers, in pieces of these lengths; the last one has what is left. */
static unsigned cut(struct piece *p, uint64_t addr, uint32_t len, uint16_t flags, const uint32_t *cuts, unsigned n)
{
	unsigned i;

	for (i = 0; i < n && cuts[i] && len > cuts[i]; i++) {
		p[i] = (struct piece){ addr, cuts[i], flags };
		addr += cuts[i];
		len -= cuts[i];
	}
	p[i++] = (struct piece){ addr, len, flags };
	return i;
}

static void expect_frame(struct net_rig *n, const uint8_t *sent, uint32_t total, uint32_t hdr_len, uint16_t buffers)
{
	uint8_t got[2 * REGION_SIZE];

	get_ram(&n->rx, RX, got, total);
	CHECK(!memcmp(got, sent, NET_HDR_LEGACY));
	if (hdr_len == HDR)
		CHECK_EQ(got[10] | got[11] << 8, buffers);
	CHECK(!memcmp(got + hdr_len, sent + hdr_len, total - hdr_len));
}

/* One frame there and back. */
static void pass(struct net_rig *n, uint32_t len, const struct piece *out, unsigned nout, const struct piece *in,
		 unsigned nin, bool indirect, const uint8_t *sent, uint32_t hdr_len)
{
	int tx, rx;

	memset(n->rx.host[0], 0xee, REGION_SIZE);
	memset(n->rx.host[1], 0xee, REGION_SIZE);
	put_ram(&n->tx, TX, sent, hdr_len + len);
	rx = rig_add(&n->rx, in, nin);
	tx = indirect ? add_indirect(&n->tx, out, nout) : rig_add(&n->tx, out, nout);
	CHECK(rx >= 0 && tx >= 0);
	serve(n);
	expect_used(&n->tx, tx, 0);
	expect_used(&n->rx, rx, hdr_len + len);
	expect_frame(n, sent, hdr_len + len, hdr_len, 1);
	CHECK_EQ(*ram(&n->rx, RX + hdr_len + len), 0xee);
	CHECK_EQ(dropped(n), 0);
}

/* Any layout (2.7.4), on each side, in memory of two regions. */
static void test_layouts(void)
{
	static const uint32_t cuts[][16] = {
		{ 12 }, { 10 }, { 1 }, { 12, 14 }, { 12, 1, 1 }, { 26 }, { 13 }, { 11, 1 }, { 11, 2 },
		{ 5, 5, 5, 5, 5 }, { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 }, { 0xffff },
	};
	static const uint32_t lens[] = { 14, 15, 60, 64, 65, 128, 1499, 1514, 1518 };
	uint8_t sent[2048];

	FOR_EACH_KIND(k) {
		struct net_rig n;

		net_rig_init(&n, kinds[k]);
		for (unsigned i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++)
			for (unsigned j = 0; j < sizeof(lens) / sizeof(lens[0]); j++)
				for (unsigned m = 0; m < 4; m++) {
					uint32_t hdr_len = m & 2 ? NET_HDR_LEGACY : HDR, len = lens[j];
					struct piece out[17], in[17];
					unsigned nout, nin;

					n.pair.rules.hdr_len = n.pair.rx.hdr_len = hdr_len;
					n.pair.rx.mergeable = hdr_len == HDR;
					make_frame(sent, (struct net_header){ 0 }, hdr_len, len);
					nout = cut(out, TX, hdr_len + len, 0, cuts[i], 16);
					nin = cut(in, RX, 2000, W, cuts[(i + j) % 12], 16);
					pass(&n, len, out, nout, in, nin, m & 1, sent, hdr_len);
				}
		net_rig_destroy(&n);
	}
}

static void test_over_a_border_of_regions(void)
{
	uint8_t sent[2048];

	FOR_EACH_KIND(k) {
		struct net_rig n;

		net_rig_init(&n, kinds[k]);
		for (uint32_t before = 1; before < 100; before++) {
			uint64_t at = 0x11000 - before;
			struct piece out = { at, HDR + 200, 0 }, in = { at, 1000, W };
			uint8_t got[HDR + 200];
			int tx = rig_add(&n.tx, &out, 1), rx = rig_add(&n.rx, &in, 1);

			make_frame(sent, (struct net_header){ 0 }, HDR, 200);
			put_ram(&n.tx, at, sent, HDR + 200);
			serve(&n);
			expect_used(&n.tx, tx, 0);
			expect_used(&n.rx, rx, HDR + 200);
			get_ram(&n.rx, at, got, sizeof(got));
			CHECK(!memcmp(got + HDR, sent + HDR, 200));
		}
		CHECK_EQ(dropped(&n), 0);
		net_rig_destroy(&n);
	}
}

/* 5.1.6.4: a frame fills as many buffers as it takes, and says how many those are. */
static void test_mergeable(void)
{
	static const uint32_t sizes[] = { 13, 26, 60, 64, 127, 500, 1517, 1530, 3000 };
	uint8_t sent[2048], got[2048];

	FOR_EACH_KIND(k) {
		struct net_rig n;

		net_rig_init(&n, kinds[k]);
		for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
			for (uint32_t len = 14; len < 700; len += 37) {
				uint32_t size = sizes[i], total = HDR + len, left = total, have = 0;
				uint32_t buffers = (total + size - 1) / size;
				struct piece out = { TX, total, 0 };
				int ids[MAX_NUM], tx;

				if (buffers > 60)
					continue;
				/* All of them in the same place: what was received is looked at one by one. */
				for (uint32_t b = 0; b < buffers; b++) {
					struct piece in = { 0x10000 + b * size, size, W };

					if (in.addr + size > 0x12000)
						in.addr = 0x10000;
					ids[b] = rig_add(&n.rx, &in, 1);
					CHECK(ids[b] >= 0);
				}
				make_frame(sent, (struct net_header){ 0 }, HDR, len);
				put_ram(&n.tx, TX, sent, total);
				tx = rig_add(&n.tx, &out, 1);
				serve(&n);
				expect_used(&n.tx, tx, 0);
				for (uint32_t b = 0; b < buffers; b++) {
					uint32_t part = left < size ? left : size;

					expect_used(&n.rx, ids[b], part);
					get_ram(&n.rx, 0x10000 + b * size, got + have, part);
					have += part;
					left -= part;
				}
				CHECK_EQ(got[10] | got[11] << 8, buffers);
				CHECK(!memcmp(got + HDR, sent + HDR, len));
			}
		CHECK_EQ(dropped(&n), 0);
		net_rig_destroy(&n);
	}
}

/* ------------------------------------------------------------------ what is sent and is no frame */

#define CSUM_AT(start, offset) { .flags = 1, .csum_start = (start), .csum_offset = (offset) }
#define GSO(type, size) { .flags = 1, .gso_type = (type), .gso_size = (size), .csum_start = 34, .csum_offset = 16 }

static const struct {
	const char *name;
	struct net_header header;
	uint32_t len; /* 0: 100 */
	enum net_drop why;
	bool without; /* offloads were not negotiated */
} headers[] = {
	{ "plain", { 0 }, 0, NET_PASSES, false },
	{ "flags that are not for devices", { .flags = 0xfe }, 0, NET_PASSES, false },
	{ "num_buffers", { .num_buffers = 0xffff }, 0, NET_PASSES, false },
	{ "hdr_len beyond the end", { .flags = 1, .hdr_len = 0xffff, .csum_start = 14 }, 0, NET_PASSES, false },
	{ "fields that mean nothing", { .hdr_len = 9, .gso_size = 7, .csum_start = 0xffff }, 0, NET_PASSES, false },
	{ "csum at the end", CSUM_AT(34, 64), 0, NET_PASSES, false },
	{ "csum over the end", CSUM_AT(34, 65), 0, NET_DROP_CSUM, false },
	{ "csum_start at the end", CSUM_AT(100, 0), 0, NET_DROP_CSUM, false },
	{ "csum_start beyond", CSUM_AT(0xffff, 0), 0, NET_DROP_CSUM, false },
	{ "csum_offset beyond", CSUM_AT(0, 0xffff), 0, NET_DROP_CSUM, false },
	{ "csum beyond 16 bits", CSUM_AT(0xffff, 0xffff), 0, NET_DROP_CSUM, false },
	{ "csum not negotiated", CSUM_AT(34, 16), 0, NET_DROP_CSUM, true },
	{ "tcp4", GSO(NET_GSO_TCPV4, 40), 0, NET_PASSES, false },
	{ "tcp6", GSO(NET_GSO_TCPV6, 1), 0, NET_PASSES, false },
	{ "tcp4 ecn", GSO(NET_GSO_TCPV4 | NET_GSO_ECN, 40), 0, NET_PASSES, false },
	{ "udp datagrams", GSO(NET_GSO_UDP_L4, 40), 0, NET_PASSES, false },
	{ "longer than the mtu", GSO(NET_GSO_TCPV4, 1400), 5000, NET_PASSES, false },
	{ "fragments not negotiated", GSO(NET_GSO_UDP, 40), 0, NET_DROP_GSO, false },
	{ "not negotiated", GSO(NET_GSO_TCPV4, 40), 0, NET_DROP_CSUM, true },
	{ "type 2", GSO(2, 40), 0, NET_DROP_GSO, false },
	{ "type 6", GSO(6, 40), 0, NET_DROP_GSO, false },
	{ "type 7", GSO(7, 40), 0, NET_DROP_GSO, false },
	{ "type 8", GSO(8, 40), 0, NET_DROP_GSO, false },
	{ "type 127", GSO(0x7f, 40), 0, NET_DROP_GSO, false },
	{ "ecn alone", GSO(NET_GSO_ECN, 40), 0, NET_DROP_GSO, false },
	{ "all ones", GSO(0xff, 40), 0, NET_DROP_GSO, false },
	{ "no size", GSO(NET_GSO_TCPV4, 0), 0, NET_DROP_GSO, false },
	{ "without a checksum", { .gso_type = NET_GSO_TCPV4, .gso_size = 40 }, 0, NET_DROP_GSO, false },
	{ "too long", { 0 }, 1519, NET_DROP_LONG, false },
	{ "too long, with a checksum", CSUM_AT(34, 16), 1519, NET_DROP_LONG, false },
	{ "too long, ignored flag", { .flags = 2 }, 1519, NET_DROP_LONG, false },
};

static void negotiate(struct net_rig *n, bool all)
{
	struct net_offloads offloads = { .csum = all };

	if (all)
		offloads.gso = 1 << NET_GSO_TCPV4 | 1 << NET_GSO_TCPV6 | 1 << NET_GSO_UDP_L4 | NET_GSO_ECN;
	n->pair.rules.offloads = n->pair.rx.offloads = offloads;
}

static void test_headers(void)
{
	uint8_t sent[2 * REGION_SIZE], got[2 * REGION_SIZE];

	for (unsigned k = 0; k < 3; k++)
		for (unsigned i = 0; i < sizeof(headers) / sizeof(headers[0]); i++)
			for (unsigned split = 0; split < 14; split++) {
				uint32_t len = headers[i].len ? headers[i].len : 100, total = HDR + len;
				struct piece in = { RX, 2 * REGION_SIZE, W }, out[2];
				struct net_header h = headers[i].header;
				struct net_rig n;
				int rx, tx;

				check_context = headers[i].name;
				net_rig_init(&n, kinds[k]);
				negotiate(&n, !headers[i].without);
				make_frame(sent, h, HDR, len);
				put_ram(&n.tx, TX, sent, total);
				rx = rig_add(&n.rx, &in, 1);
				tx = rig_add(&n.tx, out, cut(out, TX, total, 0, &split, split ? 1 : 0));
				serve(&n);
				expect_used(&n.tx, tx, 0);
				CHECK_EQ(dropped(&n), headers[i].why != NET_PASSES);
				CHECK_EQ(n.pair.counters.tx_frames, headers[i].why == NET_PASSES);
				if (headers[i].why) {
					CHECK_EQ(n.pair.counters.dropped[headers[i].why], 1);
					expect_no_used(&n.rx);
				} else {
					struct net_header back;

					expect_used(&n.rx, rx, total);
					get_ram(&n.rx, RX, got, total);
					memcpy(&back, got, sizeof(back));
					CHECK_EQ(back.flags, h.flags & 1);
					CHECK_EQ(back.gso_type, h.gso_type);
					CHECK_EQ(back.num_buffers, 1);
					CHECK(back.hdr_len <= len || !(h.flags & 1));
					if (h.flags & 1) {
						CHECK_EQ(back.csum_start, h.csum_start);
						CHECK_EQ(back.csum_offset, h.csum_offset);
						CHECK_EQ(back.gso_size, h.gso_size);
					}
					CHECK(!memcmp(got + HDR, sent + HDR, len));
				}
				net_rig_destroy(&n);
			}
}

/* Too short, too long, or for receiving: whatever the layout. */
static void test_chains_that_are_no_frames(void)
{
	static const struct {
		const char *name;
		struct piece p[20];
		unsigned n;
		enum net_drop why;
	} chains[] = {
		{ "one byte", { { TX, 1, 0 } }, 1, NET_DROP_SHORT },
		{ "less than a header", { { TX, 11, 0 } }, 1, NET_DROP_SHORT },
		{ "a header", { { TX, 12, 0 } }, 1, NET_DROP_SHORT },
		{ "no whole ethernet header", { { TX, 25, 0 } }, 1, NET_DROP_SHORT },
		{ "the same in pieces", { { TX, 12, 0 }, { TX, 13, 0 } }, 2, NET_DROP_SHORT },
		{ "part of a header", { { TX, 3, 0 }, { TX, 4, 0 } }, 2, NET_DROP_SHORT },
		{ "4 GiB",
		  { { TX, 8192, 0 }, { TX, 8192, 0 }, { TX, 8192, 0 }, { TX, 8192, 0 }, { TX, 8192, 0 },
		    { TX, 8192, 0 }, { TX, 8192, 0 }, { TX, 8192, 0 }, { TX, 8192, 0 } },
		  9,
		  NET_DROP_LONG },
	};

	for (unsigned k = 0; k < 3; k++)
		for (unsigned i = 0; i < sizeof(chains) / sizeof(chains[0]); i++)
			for (unsigned gso = 0; gso < 2; gso++) {
				struct piece in = { RX, 2 * REGION_SIZE, W };
				struct net_header h = GSO(NET_GSO_TCPV4, 40);
				struct net_rig n;
				int tx[2];

				check_context = chains[i].name;
				net_rig_init(&n, kinds[k]);
				negotiate(&n, true);
				if (gso)
					put_ram(&n.tx, TX, &h, sizeof(h));
				rig_add(&n.rx, &in, 1);
				tx[0] = rig_add(&n.tx, chains[i].p, chains[i].n);
				tx[1] = add_indirect(&n.tx, chains[i].p, chains[i].n);
				serve(&n);
				expect_used(&n.tx, tx[0], 0);
				expect_used(&n.tx, tx[1], 0);
				expect_no_used(&n.rx);
				CHECK_EQ(n.pair.counters.dropped[chains[i].why], 2);
				CHECK_EQ(dropped(&n), 2);
				net_rig_destroy(&n);
			}
}

/* DPDK's virtio_user marks the header as writable in an indirect table of a packed ring, and now and then a piece
 * of data. */
static void test_pieces_that_are_marked_as_writable(void)
{
	uint8_t sent[512];

	for (unsigned k = 0; k < 3; k++)
		for (unsigned marks = 0; marks < 16; marks++) {
			bool indirect = marks & 8;
			const struct piece out[] = { { TX, HDR, marks & 1 ? W : 0 },
						     { TX + HDR, 50, marks & 2 ? W : 0 },
						     { TX + HDR + 50, 50, marks & 4 ? W : 0 } };
			const struct piece in = { RX, 2000, W };
			struct net_rig n;

			check_context = kind_names[k];
			net_rig_init(&n, kinds[k]);
			make_frame(sent, (struct net_header){ 0 }, HDR, 100);
			pass(&n, 100, out, 3, &in, 1, indirect, sent, HDR);
			net_rig_destroy(&n);
			/* In a queue that may be written to, a readable one behind it is no chain. */
			net_rig_init(&n, kinds[k]);
			n.tx.vq.read_only = false;
			if (indirect)
				add_indirect(&n.tx, out, 3);
			else
				rig_add(&n.tx, out, 3);
			serve(&n);
			if ((marks & 7) == 0 || (marks & 7) == 4 || (marks & 7) == 6 || (marks & 7) == 7)
				CHECK_EQ(n.tx.vq.report.fault, VQ_OK);
			else
				CHECK_EQ(n.tx.vq.report.fault, VQ_WRITE_BEFORE_READ);
			net_rig_destroy(&n);
		}
}

/* ------------------------------------------------------------------ receive buffers that are none */

static int send_one(struct net_rig *n, uint32_t len)
{
	struct piece out = { TX, HDR + len, 0 };
	int tx;

	memset(n->tx.host[0], 0, HDR);
	tx = rig_add(&n->tx, &out, 1);
	CHECK(tx >= 0);
	serve(n);
	expect_used(&n->tx, tx, 0);
	return tx;
}

static void test_no_buffer(void)
{
	FOR_EACH_KIND(k) {
		struct piece in = { RX, 100, W };
		struct net_rig n;
		int rx[3];

		net_rig_init(&n, kinds[k]);
		send_one(&n, 60);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_NO_BUFFER], 1);
		/* Two buffers of three: none of them is lost, and both are the next frame's. */
		rx[0] = rig_add(&n.rx, &in, 1);
		rx[1] = rig_add(&n.rx, &in, 1);
		send_one(&n, 250);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_NO_BUFFER], 2);
		expect_no_used(&n.rx);
		rx[2] = rig_add(&n.rx, &in, 1);
		send_one(&n, 250);
		expect_used(&n.rx, rx[0], 100);
		expect_used(&n.rx, rx[1], 100);
		expect_used(&n.rx, rx[2], HDR + 250 - 200);
		CHECK_EQ(dropped(&n), 2);
		CHECK_EQ(n.pair.counters.rx_frames, 1);
		CHECK_EQ(n.pair.counters.rx_bytes, 250);
		net_rig_destroy(&n);
	}
}

/* Without MRG_RXBUF a frame is in one buffer; one that is too small is the next frame's. */
static void test_no_room(void)
{
	FOR_EACH_KIND(k) {
		struct piece in = { RX, 100, W };
		struct net_rig n;
		int rx;

		net_rig_init(&n, kinds[k]);
		n.pair.rx.mergeable = false;
		rx = rig_add(&n.rx, &in, 1);
		rig_add(&n.rx, &in, 1);
		send_one(&n, 89);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_NO_ROOM], 1);
		expect_no_used(&n.rx);
		send_one(&n, 88);
		expect_used(&n.rx, rx, 100);
		CHECK_EQ(dropped(&n), 1);
		net_rig_destroy(&n);
	}
}

/* A frame for which all buffers of a full ring are too small, merged: it would be waited for in vain. */
static void test_no_room_in_a_whole_ring(void)
{
	FOR_EACH_KIND(k) {
		struct piece in[2] = { { RX, 20, W }, { RX + 20, 20, W } };
		struct net_rig n;
		unsigned count = 0;

		for (unsigned pieces = 1; pieces < 3; pieces++) {
			net_rig_init(&n, kinds[k]);
			while (n.rx.free >= pieces && rig_add(&n.rx, in, pieces) >= 0)
				count += 20 * pieces;
			while (n.rx.free && rig_add(&n.rx, in, 1) >= 0)
				count += 20;
			send_one(&n, count - HDR + 1);
			CHECK_EQ(n.pair.counters.dropped[NET_DROP_NO_ROOM], 1);
			CHECK(!n.pair.rx.starved);
			expect_no_used(&n.rx);
			send_one(&n, count - HDR);
			CHECK_EQ(n.pair.counters.rx_frames, 1);
			CHECK_EQ(dropped(&n), 1);
			count = 0;
			net_rig_destroy(&n);
		}
	}
}

/* A driver may receive where it sends from: nothing but its own data suffers. */
static void test_a_frame_that_lies_in_its_buffer(void)
{
	uint8_t want[200], got[200];

	FOR_EACH_KIND(k)
		for (unsigned pieces = 1; pieces < 3; pieces++) {
			struct piece in[2] = { { RX, pieces == 1 ? 400 : 100, W }, { RX + 100, 300, W } };
			struct iovec iov;
			struct net_frame f = { .len = sizeof(want), .num = 1, .iov = &iov };
			struct net_rig n;
			int rx;

			net_rig_init(&n, kinds[k]);
			rx = rig_add(&n.rx, in, pieces);
			iov = (struct iovec){ ram(&n.rx, RX + HDR + 8), sizeof(want) };
			make_frame(want, (struct net_header){ 0 }, 0, sizeof(want));
			put_ram(&n.rx, RX + HDR + 8, want, sizeof(want));
			CHECK_EQ(net_receiver_put(&n.pair.rx, &f, 1), 1);
			expect_used(&n.rx, rx, HDR + sizeof(want));
			get_ram(&n.rx, RX + HDR, got, sizeof(got));
			CHECK(!memcmp(got, want, sizeof(got)));
			net_rig_destroy(&n);
		}
}

/* No frame fits where its header does not (5.1.6.3.1). */
static void test_buffers_without_room_for_a_header(void)
{
	static const struct {
		struct piece p[2];
		unsigned n;
	} bad[] = { { { { RX, 1, W } }, 1 },
		    { { { RX, 11, W } }, 1 },
		    { { { RX, 4, W }, { RX, 7, W } }, 2 },
		    { { { RX, 100, 0 } }, 1 },
		    { { { RX, 100, 0 }, { RX, 11, W } }, 2 } };

	FOR_EACH_KIND(k) {
		unsigned count = sizeof(bad) / sizeof(bad[0]);
		struct piece in = { RX, 100, W };
		struct net_rig n;
		int ids[8], rx;

		net_rig_init(&n, kinds[k]);
		for (unsigned i = 0; i < count; i++)
			ids[i] = rig_add(&n.rx, bad[i].p, bad[i].n);
		rx = rig_add(&n.rx, &in, 1);
		send_one(&n, 60);
		for (unsigned i = 0; i < count; i++)
			expect_used(&n.rx, ids[i], 0);
		expect_used(&n.rx, rx, HDR + 60);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_BUFFER], count);
		CHECK_EQ(dropped(&n), count);
		net_rig_destroy(&n);
	}
}

/* What is readable there is no business of ours. */
static void test_receive_buffer_with_a_readable_part(void)
{
	uint8_t sent[512];

	FOR_EACH_KIND(k) {
		const struct piece in[] = { { 0x11800, 16, 0 }, { RX, 500, W } }, out = { TX, HDR + 99, 0 };
		struct net_rig n;

		net_rig_init(&n, kinds[k]);
		make_frame(sent, (struct net_header){ 0 }, HDR, 99);
		pass(&n, 99, &out, 1, in, 2, false, sent, HDR);
		net_rig_destroy(&n);
	}
}

static void test_longer_than_the_receivers_mtu(void)
{
	struct piece in = { RX, 2 * REGION_SIZE, W };
	struct net_rig n;
	int rx;

	net_rig_init(&n, kinds[0]);
	n.pair.rx.longest = 1000;
	rx = rig_add(&n.rx, &in, 1);
	send_one(&n, 1001);
	CHECK_EQ(n.pair.counters.dropped[NET_DROP_MTU], 1);
	send_one(&n, 1000);
	expect_used(&n.rx, rx, HDR + 1000);
	net_rig_destroy(&n);
}

/* A queue that breaks, and one that is not there, leave the other one alone. */
static void test_broken_queues(void)
{
	FOR_EACH_KIND(k) {
		struct piece bad = { HOLE, 100, W }, in = { RX, 100, W }, bad_out = { HOLE, 100, 0 };
		struct net_rig n;
		int rx;

		net_rig_init(&n, kinds[k]);
		rx = rig_add(&n.rx, &in, 1);
		rig_add(&n.rx, &bad, 1);
		send_one(&n, 60);
		expect_used(&n.rx, rx, HDR + 60);
		send_one(&n, 60);
		CHECK(n.rxq.engine.failed);
		CHECK_EQ(n.rx.vq.report.fault, VQ_ADDRESS);
		send_one(&n, 60);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_STOPPED] + n.pair.counters.dropped[NET_DROP_NO_BUFFER], 2);
		CHECK_EQ(n.pair.counters.rx_frames, 1);
		CHECK_EQ(n.pair.counters.tx_frames, 3);
		CHECK(!serve_rx(&n));
		rig_add(&n.tx, &bad_out, 1);
		serve(&n);
		CHECK(n.txq.engine.failed);
		net_rig_destroy(&n);

		net_rig_init(&n, kinds[k]);
		n.rxq.engine.failed = true; /* never looked at: it is as good as not there */
		rig_add(&n.rx, &in, 1);
		send_one(&n, 60);
		CHECK_EQ(n.pair.counters.dropped[NET_DROP_STOPPED], 1);
		net_rig_destroy(&n);
	}
}

/* Of a batch, the good ones pass, in their order, and the bad ones do not stop them. */
static void test_batches(void)
{
	FOR_EACH_KIND(k) {
		struct net_rig n;
		unsigned bad = 0;

		net_rig_init(&n, kinds[k]);
		for (unsigned round = 0; round < 300; round++) {
			unsigned count = 1 + rnd(28), good = 0, room = rnd(50);
			uint8_t tags[32];
			uint16_t id;
			uint32_t len;

			for (unsigned i = 0; i < room; i++) {
				struct piece in = { 0x10000 + i * 128, 128, W };

				if (rig_add(&n.rx, &in, 1) < 0)
					room = i;
			}
			for (unsigned i = 0; i < count; i++) {
				uint64_t at = 0x10000 + i * 256;
				bool is_bad = !rnd(4), pieces = !rnd(3);
				struct piece out[2] = { { at, pieces ? HDR : HDR + 40 + i, 0 },
							{ at + HDR, 40 + i, 0 } };

				if (is_bad)
					out[0].len = 11;
				memset(ram(&n.tx, at), 0, HDR);
				*ram(&n.tx, at + HDR) = (uint8_t)(round + i);
				CHECK(rig_add(&n.tx, out, pieces && !is_bad ? 2 : 1) >= 0);
				if (!is_bad)
					tags[good++] = (uint8_t)(round + i);
				bad += is_bad;
			}
			serve(&n);
			for (unsigned i = 0; i < count; i++)
				CHECK(rig_used(&n.tx, &id, &len));
			expect_no_used(&n.tx);
			/* One by one into the buffers in their order; those that were left over stay. */
			net_receiver_settle(&n.pair.rx);
			for (unsigned i = 0; i < good && i < room; i++) {
				CHECK(rig_used(&n.rx, &id, &len));
				CHECK_EQ(*ram(&n.rx, 0x10000 + i * 128 + HDR), tags[i]);
				CHECK(len >= HDR + 40);
			}
			expect_no_used(&n.rx);
			/* So that each round begins with none. */
			net_receiver_open(&n.pair.rx, &n.rxq.engine);
			for (unsigned i = good; i < room; i++) {
				send_one(&n, 60);
				CHECK(rig_used(&n.rx, &id, &len));
			}
			CHECK_EQ(n.pair.counters.dropped[NET_DROP_SHORT], bad);
		}
		net_rig_destroy(&n);
	}
}

/* ------------------------------------------------------------------ checksums */

/* RFC 1071, as it is written there. */
static uint16_t simple_csum(const uint8_t *p, uint32_t len)
{
	uint32_t sum = 0;

	for (uint32_t i = 0; i < len; i++)
		sum += i % 2 ? p[i] : p[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* What the receiver does not do itself is done for it. */
static void test_checksums_are_filled_in(void)
{
	for (uint32_t len = 40; len < 120; len++)
		for (uint16_t start = 14; start < 20; start++) {
			struct piece out[2] = { { TX, HDR + 30, 0 }, { TX + HDR + 30, len - 30, 0 } };
			struct net_header h = CSUM_AT(start, 7);
			uint8_t sent[256], got[256];
			struct piece in = { RX, 500, W };
			uint16_t want, have;
			struct net_rig n;
			int rx;

			check_context = "";
			net_rig_init(&n, kinds[len % 3]);
			negotiate(&n, true);
			n.pair.rx.offloads.csum = false;
			make_frame(sent, h, HDR, len);
			if (len == 77) /* what is 0 is sent as the other 0 */
				memset(sent + HDR + start, 0xff, len - start);
			put_ram(&n.tx, TX, sent, HDR + len);
			rx = rig_add(&n.rx, &in, 1);
			rig_add(&n.tx, out, 2);
			serve(&n);
			expect_used(&n.rx, rx, HDR + len);
			get_ram(&n.rx, RX, got, HDR + len);
			want = simple_csum(sent + HDR + start, len - start);
			have = (uint16_t)(got[HDR + start + 7] << 8 | got[HDR + start + 8]);
			CHECK_EQ(have, want ? want : 0xffff);
			memcpy(sent + HDR + start + 7, got + HDR + start + 7, 2);
			CHECK(!memcmp(got + HDR, sent + HDR, len));
			for (unsigned i = 0; i < 10; i++)
				CHECK_EQ(got[i], 0);
			net_rig_destroy(&n);
		}
}

/* ------------------------------------------------------------------ the other wires */

static void test_drop(void)
{
	struct net_rig n;

	check_context = "";
	net_rig_init(&n, kinds[2]);
	n.pair.wire = &net_wire_drop;
	n.pair.peer = NULL;
	for (unsigned i = 0; i < 200; i++)
		send_one(&n, 60);
	CHECK_EQ(n.pair.counters.tx_frames, 200);
	CHECK_EQ(n.pair.counters.tx_bytes, 200 * 60);
	CHECK_EQ(dropped(&n), 0);
	CHECK(!serve_rx(&n));
	CHECK(!net_receive_ops.arm(&n.rxq.engine));
	net_rig_destroy(&n);
}

/* The queue stops, and starts with other rules. */
static void renegotiate(struct net_rig *n, bool mergeable)
{
	n->rxq.engine.leaving = true;
	net_receive_ops.settle(&n->rxq.engine);
	n->rxq.engine.leaving = false;
	n->pair.rx.mergeable = mergeable;
	net_receive_ops.begin(&n->rxq.engine);
}

static void test_source(void)
{
	uint8_t frame[300], got[300];

	FOR_EACH_KIND(k) {
		struct piece in = { RX, 400, W }, small = { RX, 100, W };
		struct net_rig n;
		int rx;

		net_rig_init(&n, kinds[k]);
		make_frame(frame, (struct net_header){ 0 }, 0, sizeof(frame));
		n.pair.wire = &net_wire_source;
		n.pair.source = frame;
		n.pair.source_len = sizeof(frame);
		/* No buffers: it asks for a kick, and does not look again before there is one. */
		CHECK(!serve_rx(&n));
		CHECK(!n.rxq.engine.armed);
		CHECK(!net_receive_ops.has_work(&n.rxq.engine));
		CHECK(!net_receive_ops.arm(&n.rxq.engine));
		for (unsigned i = 0; i < 40; i++)
			CHECK(rig_add(&n.rx, &in, 1) >= 0);
		CHECK(net_receive_ops.has_work(&n.rxq.engine));
		CHECK(net_receive_ops.arm(&n.rxq.engine));
		while (serve_rx(&n))
			;
		for (unsigned i = 0; i < 40; i++) {
			uint16_t id;
			uint32_t len;

			CHECK(rig_used(&n.rx, &id, &len));
			CHECK_EQ(len, HDR + sizeof(frame));
		}
		get_ram(&n.rx, RX + HDR, got, sizeof(got));
		CHECK(!memcmp(frame, got, sizeof(got)));
		/* Nor does it try for ever what does not fit, however many buffers there are. */
		renegotiate(&n, false);
		for (unsigned i = 0; i < 40; i++)
			rig_add(&n.rx, &small, 1);
		CHECK(!serve_rx(&n));
		CHECK(!serve_rx(&n));
		CHECK(!net_receive_ops.has_work(&n.rxq.engine));
		CHECK(!net_receive_ops.arm(&n.rxq.engine));
		CHECK_EQ(n.pair.counters.rx_frames, 40);
		/* A buffer of no use in front keeps nobody from what comes after it, once it is merged. */
		renegotiate(&n, true);
		rx = rig_add(&n.rx, &in, 1);
		CHECK(serve_rx(&n));
		while (serve_rx(&n))
			;
		(void)rx;
		CHECK_EQ(n.pair.counters.rx_frames, 40 + 10 + 1); /* of four small ones each, and the last */
		net_rig_destroy(&n);
	}
}

/* What was taken ahead is given back, and popped again, in its order. */
static void test_buffers_taken_ahead_are_given_back(void)
{
	FOR_EACH_KIND(k) {
		struct piece in = { RX, 100, W };
		struct net_rig n;
		int ids[20];

		net_rig_init(&n, kinds[k]);
		for (unsigned i = 0; i < 20; i++)
			ids[i] = rig_add(&n.rx, &in, 1);
		serve_rx(&n);
		for (unsigned i = 0; i < 20; i++) {
			send_one(&n, 60);
			expect_used(&n.rx, ids[i], HDR + 60);
			if (i % 3)
				continue;
			net_receive_ops.settle(&n.rxq.engine);
			CHECK_EQ(n.rx.vq.inuse, 0);
			CHECK(!n.rxq.engine.busy);
		}
		CHECK_EQ(dropped(&n), 0);
		net_rig_destroy(&n);
	}
}

int main(void)
{
	RUN(test_layouts);
	RUN(test_over_a_border_of_regions);
	RUN(test_mergeable);
	RUN(test_headers);
	RUN(test_chains_that_are_no_frames);
	RUN(test_pieces_that_are_marked_as_writable);
	RUN(test_no_buffer);
	RUN(test_no_room);
	RUN(test_no_room_in_a_whole_ring);
	RUN(test_a_frame_that_lies_in_its_buffer);
	RUN(test_buffers_without_room_for_a_header);
	RUN(test_receive_buffer_with_a_readable_part);
	RUN(test_longer_than_the_receivers_mtu);
	RUN(test_broken_queues);
	RUN(test_batches);
	RUN(test_checksums_are_filled_in);
	RUN(test_drop);
	RUN(test_source);
	RUN(test_buffers_taken_ahead_are_given_back);
	return 0;
}
