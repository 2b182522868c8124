/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The wire with a descriptor, against sockets: what looks like a tap to it is a socket, too, whose messages have
 * the header that a tap's frames have. So the far end can say what no kernel would.
 */
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_fd.h"
#include "net_rig.h"

static const struct options kinds[] = {
	{ .num = 64, .indirect = true },
	{ .num = 61, .packed = true, .indirect = true },
};

#define FOR_EACH_KIND(k)                                                                           \
	for (unsigned k = 0; k < 2; k++)                                                           \
		if ((check_context = k ? "packed" : "split"))

#define TX 0x10000u
#define RX 0x10000u
#define BUFFER 256u

struct wire {
	struct net_rig n;
	int far, near;
	bool tap;
};

static void wire_init(struct wire *w, struct options o, bool tap)
{
	int fds[2];

	net_rig_init(&w->n, o);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, fds), 0);
	w->far = fds[0];
	w->near = fds[1];
	w->tap = tap;
	CHECK_EQ(net_fd_connect(&w->n.pair, w->near, !tap), 0);
}

static void wire_destroy(struct wire *w)
{
	net_rig_destroy(&w->n);
	close(w->far);
	close(w->near);
}

static int post(struct wire *w, unsigned i)
{
	struct piece p = { RX + i * BUFFER, BUFFER, W };
	int head = rig_add(&w->n.rx, &p, 1);

	CHECK(head >= 0);
	return head;
}

static void say(struct wire *w, struct net_header h, uint32_t len)
{
	uint8_t data[2048];
	uint32_t hdr_len = w->tap ? HDR : 0;

	CHECK(make_frame(data, h, hdr_len, len) <= sizeof(data));
	CHECK_EQ(send(w->far, data, hdr_len + len, 0), hdr_len + len);
}

static uint64_t count(const struct wire *w, enum net_drop why)
{
	return w->n.pair.counters.dropped[why];
}

/* Whatever comes, no frame but a right one uses a buffer. */
static void test_what_is_no_frame(void)
{
	static const struct net_header csum_out = { .flags = 1, .csum_start = 55, .csum_offset = 4 },
				       csum_far = { .flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff },
				       gso_plain = { .gso_type = NET_GSO_TCPV4, .gso_size = 10 },
				       gso_zero = { .flags = 1, .gso_type = NET_GSO_TCPV4, .csum_start = 34, .csum_offset = 16 },
				       gso_not = { .flags = 1, .gso_type = NET_GSO_TCPV4, .gso_size = 10, .csum_start = 34, .csum_offset = 16 };

	FOR_EACH_KIND(k) {
		struct wire w;
		int head;

		wire_init(&w, kinds[k], true);
		CHECK(!serve_rx(&w.n));
		head = post(&w, 0);
		CHECK(!serve_rx(&w.n));
		for (unsigned i = 0; i < HDR + NET_ETH_HDR; i++)
			CHECK_EQ(send(w.far, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", i, 0), i);
		say(&w, csum_out, 60);
		say(&w, csum_far, 60);
		say(&w, gso_plain, 60);
		say(&w, gso_zero, 60);
		say(&w, gso_not, 60);
		say(&w, (struct net_header){ .flags = 0xfe, .hdr_len = 7 }, 60);
		for (int i = 0; i < 4; i++)
			serve_rx(&w.n);
		expect_used(&w.n.rx, head, HDR + 60);
		CHECK_EQ(count(&w, NET_DROP_SHORT), HDR + NET_ETH_HDR);
		CHECK_EQ(count(&w, NET_DROP_CSUM), 2);
		CHECK_EQ(count(&w, NET_DROP_GSO), 3);
		CHECK_EQ(dropped(&w.n), HDR + NET_ETH_HDR + 5);
		/* DATA_VALID was said to a driver that has not asked for it. */
		CHECK_EQ(*ram(&w.n.rx, RX), 0);
		wire_destroy(&w);
	}
}

/* Frames wait for buffers, in their order; of one that takes several, too. */
static void test_waits_for_buffers(void)
{
	FOR_EACH_KIND(k) {
		struct wire w;
		int heads[20];

		for (unsigned tap = 0; tap < 2; tap++) {
			wire_init(&w, kinds[k], tap);
			for (unsigned i = 0; i < 10; i++)
				say(&w, (struct net_header){ 0 }, 300);
			for (unsigned i = 0; i < 20; i++) {
				heads[i] = post(&w, i);
				CHECK_EQ(serve_rx(&w.n), i % 2);
				CHECK_EQ(w.n.pair.counters.rx_frames, (i + 1) / 2);
				CHECK_EQ(w.n.pair.rx.starved, i < 19); /* then a kick is wanted */
				if (i % 2) {
					expect_used(&w.n.rx, heads[i - 1], BUFFER);
					expect_used(&w.n.rx, heads[i], HDR + 300 - BUFFER);
				}
			}
			CHECK_EQ(dropped(&w.n), 0);
			wire_destroy(&w);
		}
	}
}

/* Those that wait were made for the driver that was there. */
static void test_another_driver(void)
{
	static const struct net_header open_csum = { .flags = 1, .csum_start = 14, .csum_offset = 6 };
	struct wire w;
	int head;

	FOR_EACH_KIND(k) {
		wire_init(&w, kinds[k], true);
		w.n.pair.rx.offloads.csum = true;
		say(&w, open_csum, 300);
		say(&w, open_csum, 300);
		head = post(&w, 0);
		CHECK(!serve_rx(&w.n));
		w.n.rxq.engine.leaving = true;
		net_receive_ops.settle(&w.n.rxq.engine);
		CHECK_EQ(w.n.rx.vq.inuse, 0);
		w.n.pair.rx.offloads.csum = false;
		w.n.rxq.engine.leaving = false;
		net_receive_ops.begin(&w.n.rxq.engine);
		say(&w, open_csum, 60);
		serve_rx(&w.n);
		expect_used(&w.n.rx, head, HDR + 60);
		CHECK_EQ(*ram(&w.n.rx, RX), 0);
		CHECK_EQ(count(&w, NET_DROP_STOPPED), 2);
		wire_destroy(&w);
	}
}

/* More pieces than are written as they lie. */
static void test_frames_in_many_pieces(void)
{
	struct piece p[200];
	uint8_t sent[HDR + 400], got[1024];
	struct wire w;
	int head;

	for (unsigned tap = 0; tap < 2; tap++) {
		wire_init(&w, kinds[0], tap);
		for (unsigned i = 0; i < 200; i++)
			p[i] = (struct piece){ TX + 2 * i, i == 199 ? HDR + 2 : 2, 0 };
		make_frame(sent, (struct net_header){ 0 }, HDR, 400);
		put_ram(&w.n.tx, TX, sent, HDR + 400);
		head = add_indirect(&w.n.tx, p, 200);
		CHECK(head >= 0);
		serve(&w.n);
		expect_used(&w.n.tx, head, 0);
		CHECK_EQ(recv(w.far, got, sizeof(got), 0), (tap ? HDR : 0) + 400);
		CHECK(!memcmp(got + (tap ? HDR : 0), sent + HDR, 400));
		CHECK_EQ(dropped(&w.n), 0);
		wire_destroy(&w);
	}
}

/* An empty message is none, wherever it is among others, also if who sent them is gone. */
static void test_frames_behind_an_empty_message(void)
{
	FOR_EACH_KIND(k) {
		struct wire w;
		int heads[3];

		wire_init(&w, kinds[k], false);
		for (unsigned i = 0; i < 3; i++) {
			heads[i] = post(&w, i);
			CHECK_EQ(send(w.far, "", 0, 0), 0);
			say(&w, (struct net_header){ 0 }, 60);
		}
		close(w.far);
		while (serve_rx(&w.n))
			;
		for (unsigned i = 0; i < 3; i++)
			expect_used(&w.n.rx, heads[i], HDR + 60);
		CHECK_EQ(dropped(&w.n), 3);
		CHECK(!serve_rx(&w.n));
		w.far = dup(w.near);
		wire_destroy(&w);
	}
}

/* Whoever has the same open file may say that it blocks. */
static void test_a_socket_that_blocks(void)
{
	struct piece p = { TX, HDR + 1000, 0 };
	struct wire w;

	wire_init(&w, kinds[0], false);
	CHECK_EQ(fcntl(w.near, F_SETFL, 0), 0);
	alarm(20);
	post(&w, 0);
	CHECK(!serve_rx(&w.n));
	while (!count(&w, NET_DROP_WIRE)) {
		int head = rig_add(&w.n.tx, &p, 1);

		serve(&w.n);
		expect_used(&w.n.tx, head, 0);
	}
	alarm(0);
	wire_destroy(&w);
}

/* A frame that no driver's buffers hold keeps nobody from what comes behind it. */
static void test_longer_than_all_buffers(void)
{
	FOR_EACH_KIND(k) {
		struct wire w;
		int head;

		for (unsigned tap = 0; tap < 2; tap++) {
			struct piece p = { RX, 20, W };

			wire_init(&w, kinds[k], tap);
			say(&w, (struct net_header){ 0 }, 1400);
			say(&w, (struct net_header){ 0 }, 20);
			CHECK(!serve_rx(&w.n));
			head = rig_add(&w.n.rx, &p, 1);
			CHECK(!serve_rx(&w.n));
			while (w.n.rx.free)
				rig_add(&w.n.rx, &p, 1);
			while (serve_rx(&w.n))
				;
			expect_used(&w.n.rx, head, 20);
			CHECK_EQ(w.n.pair.counters.rx_frames, 1);
			CHECK_EQ(count(&w, NET_DROP_NO_ROOM), 1);
			wire_destroy(&w);
		}
	}
}

static void test_the_far_end_is_gone(void)
{
	struct wire w;

	FOR_EACH_KIND(k) {
		wire_init(&w, kinds[k], false);
		post(&w, 0);
		CHECK_EQ(send(w.far, "", 0, 0), 0);
		CHECK(serve_rx(&w.n));
		close(w.far);
		CHECK(!serve_rx(&w.n));
		CHECK(!serve_rx(&w.n));
		CHECK_EQ(dropped(&w.n), 1);
		w.far = dup(w.near);
		wire_destroy(&w);
	}
}

int main(void)
{
	RUN(test_what_is_no_frame);
	RUN(test_waits_for_buffers);
	RUN(test_another_driver);
	RUN(test_frames_in_many_pieces);
	RUN(test_the_far_end_is_gone);
	RUN(test_frames_behind_an_empty_message);
	RUN(test_a_socket_that_blocks);
	RUN(test_longer_than_all_buffers);
	return 0;
}
