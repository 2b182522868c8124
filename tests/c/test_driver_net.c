/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A network driver's data path against a device that is played by hand, and lies: about lengths, about
 * num_buffers, about which frames there are. Slots are as long as they are said to be, so that ASan sees
 * a byte too many.
 */
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "driver_net.h"
#include "net_csum.h"
#include "driver_rig.h"

#define SLOT 128u
#define NUM 8u
#define ADDR 0x100000000ull

struct nic {
	struct rig r;
	uint8_t *memory;
	struct net_slots slots;
	struct net_tx tx;
	struct net_rx rx;
};

static void nic_init(struct nic *n, bool packed)
{
	struct options o = { .packed = packed, .num = NUM };

	set_context(&o);
	rig_init(&n->r, &o);
	n->memory = aligned_alloc(64, SLOT * NUM);
	n->slots = (struct net_slots){ n->memory, ADDR, SLOT, NUM };
}

static void nic_free(struct nic *n)
{
	free(n->memory);
	rig_free(&n->r);
}

static void tx_init(struct nic *n, bool packed, uint32_t hdr_len)
{
	nic_init(n, packed);
	CHECK_EQ(net_tx_init(&n->tx, &n->r.dq, &n->slots, hdr_len, -1), 0);
}

static void rx_init(struct nic *n, bool packed, uint32_t hdr_len, bool mergeable)
{
	nic_init(n, packed);
	CHECK_EQ(net_rx_init(&n->rx, &n->r.dq, &n->slots, hdr_len, mergeable, -1), 0);
	CHECK_EQ(net_rx_fill(&n->rx), 0);
	CHECK_EQ(n->r.dq.num_free, 0);
}

static uint8_t *at(struct nic *n, uint64_t addr)
{
	CHECK(addr >= ADDR && addr < ADDR + SLOT * NUM);
	return n->memory + (addr - ADDR);
}

static void test_init(void)
{
	struct nic n;
	struct net_slots s;

	nic_init(&n, false);
	for (int i = 0; i < 5; i++) {
		s = n.slots;
		if (i == 0)
			s.num = NUM + 1;
		if (i == 1)
			s.num = 0;
		if (i == 2)
			s.size = 100; /* no multiple of the alignment */
		if (i == 3)
			s.size = 0;
		if (i == 4)
			s.host += 8;
		CHECK_EQ(net_tx_init(&n.tx, &n.r.dq, &s, 12, -1), -EINVAL);
		CHECK_EQ(net_rx_init(&n.rx, &n.r.dq, &s, 12, true, -1), -EINVAL);
	}
	CHECK_EQ(net_tx_init(&n.tx, &n.r.dq, &n.slots, 11, -1), -EINVAL);
	CHECK_EQ(net_rx_init(&n.rx, &n.r.dq, &n.slots, 10, true, -1), -EINVAL);
	nic_free(&n);
}

static void test_send(void)
{
	uint8_t frame[200];
	struct net_header h = { 1, 2, 3, 4, 5, 6, 7 };

	for (unsigned i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)i;
	for (int v = 0; v < 4; v++) {
		uint32_t hdr_len = v & 1 ? 12 : 10;
		struct net_out out[2] = { { frame, 20, NULL }, { frame, SLOT - hdr_len, &h } };
		struct nic n;
		struct seen s;

		tx_init(&n, v & 2, hdr_len);
		CHECK_EQ(net_tx_longest(&n.tx), SLOT - hdr_len);
		for (unsigned lap = 0; lap < 50; lap++) {
			memset(n.memory, 0xee, SLOT * NUM);
			CHECK_EQ(net_tx_send(&n.tx, out, 2), 2);
			for (int i = 0; i < 2; i++) {
				const uint8_t *p;

				CHECK(dev_pop(&n.r, &s));
				CHECK_EQ(s.n, 1);
				CHECK(!s.write[0]);
				CHECK_EQ(s.bufs[0].len, hdr_len + out[i].len);
				p = at(&n, s.bufs[0].addr);
				for (unsigned k = 0; k < hdr_len; k++) /* num_buffers is 0 */
					CHECK_EQ(p[k], i && k < 10 ? ((uint8_t *)&h)[k] : 0);
				CHECK(!memcmp(p + hdr_len, frame, out[i].len));
				dev_use(&n.r, &s, 0);
			}
		}
		/* Not the first: what is before goes out. */
		out[1].len = SLOT - hdr_len + 1;
		CHECK_EQ(net_tx_send(&n.tx, out, 2), 1);
		CHECK_EQ(net_tx_send(&n.tx, out + 1, 1), -EMSGSIZE);
		out[0].len = 13;
		CHECK_EQ(net_tx_send(&n.tx, out, 1), -EMSGSIZE);
		CHECK_EQ(net_tx_send(&n.tx, out, 0), 0);
		net_tx_destroy(&n.tx);
		nic_free(&n);
	}
}

static void test_send_full(void)
{
	uint8_t frame[60] = { 0 };
	struct net_out out[3 * NUM];

	for (unsigned i = 0; i < 3 * NUM; i++)
		out[i] = (struct net_out){ frame, 60, NULL };
	for (int packed = 0; packed < 2; packed++) {
		struct nic n;
		struct seen s[NUM];

		tx_init(&n, packed, 12);
		for (unsigned lap = 0; lap < 20; lap++) {
			CHECK_EQ(net_tx_send(&n.tx, out, 3 * NUM), NUM);
			CHECK_EQ(net_tx_send(&n.tx, out, 1), 0);
			for (unsigned i = 0; i < NUM; i++)
				CHECK(dev_pop(&n.r, &s[i]));
			for (unsigned i = 0; i < NUM; i++) /* in another order */
				dev_use(&n.r, &s[(i * 3 + lap) % NUM], 0);
			CHECK_EQ(net_tx_reap(&n.tx), 0);
			CHECK_EQ(n.tx.nfree, NUM);
		}
		/* Used twice: broken, and no slot is free twice. */
		CHECK_EQ(net_tx_send(&n.tx, out, 2), 2);
		CHECK(dev_pop(&n.r, &s[0]));
		CHECK(dev_pop(&n.r, &s[1]));
		dev_use(&n.r, &s[0], 0);
		dev_use(&n.r, &s[0], 0);
		CHECK_EQ(net_tx_reap(&n.tx), -EIO);
		CHECK(n.tx.nfree <= NUM);
		CHECK_EQ(net_tx_send(&n.tx, out, NUM), -EIO);
		net_tx_destroy(&n.tx);
		nic_free(&n);
	}
}

/* The device: puts a frame of `len` bytes in all, header included, into as many buffers as `claims` says. */
static unsigned deliver(struct nic *n, uint32_t len, uint16_t num_buffers, unsigned buffers, uint8_t flags,
			uint16_t start)
{
	for (unsigned i = 0; i < buffers; i++) {
		uint32_t some = len < SLOT ? len : SLOT;
		struct seen s;
		uint8_t *p;

		CHECK(dev_pop(&n->r, &s));
		CHECK_EQ(s.n, 1);
		CHECK(s.write[0]);
		CHECK_EQ(s.bufs[0].len, SLOT);
		p = at(n, s.bufs[0].addr);
		memset(p, (int)i + 1, SLOT);
		if (!i) {
			struct net_header h = { .flags = flags,
						.csum_start = start,
						.num_buffers = num_buffers };

			memcpy(p, &h, sizeof(h));
		}
		dev_use(&n->r, &s, some);
		len -= some;
	}
	return buffers;
}

static int take(struct nic *n, struct net_in *f, unsigned count)
{
	int rc = net_rx_take(&n->rx, f, count);

	return rc;
}

static void test_receive(void)
{
	struct net_in f[NUM];

	for (int packed = 0; packed < 2; packed++) {
		struct nic n;

		rx_init(&n, packed, 12, true);
		CHECK_EQ(take(&n, f, NUM), 0);
		for (unsigned lap = 0; lap < 50; lap++) {
			uint8_t *copy;

			deliver(&n, 26, 1, 1, 0, 0);
			deliver(&n, 3 * SLOT - 5, 3, 3, 0, 0);
			deliver(&n, SLOT, 0, 1, 0, 0);
			CHECK_EQ(take(&n, f, NUM), 3);
			CHECK_EQ(f[0].len, 14);
			CHECK_EQ(f[1].len, 3 * SLOT - 17);
			CHECK_EQ(f[1].nparts, 3);
			CHECK_EQ(f[2].len, SLOT - 12);
			copy = malloc(f[1].len);
			net_rx_copy(&n.rx, &f[1], copy);
			for (unsigned i = 0; i < f[1].len; i++)
				CHECK_EQ(copy[i], (i + 12) / SLOT + 1);
			free(copy);
			CHECK_EQ(net_rx_release(&n.rx), 0);
			CHECK_EQ(n.r.dq.num_free, 0);
		}
		net_rx_destroy(&n.rx);
		nic_free(&n);
	}
}

static const struct lie {
	uint32_t len;
	uint16_t num_buffers;
	unsigned buffers;
	uint8_t flags;
	uint16_t start;
	enum net_fault fault;
	uint64_t value, limit;
} lies[] = {
	{ 0, 1, 1, 0, 0, NET_SHORT, 0, 26 },
	{ 11, 1, 1, 0, 0, NET_SHORT, 11, 26 },
	{ 25, 1, 1, 0, 0, NET_SHORT, 25, 26 },
	{ 60, 2, 1, 0, 0, NET_BUFFERS, 2, 1 },
	{ 2 * SLOT, 3, 2, 0, 0, NET_BUFFERS, 3, 2 },
	{ 60, NUM + 1, 1, 0, 0, NET_BUFFERS, NUM + 1, NUM },
	{ 60, 0xffff, 1, 0, 0, NET_BUFFERS, 0xffff, NUM },
	{ 60, 1, 1, 1, 47, NET_CSUM, 49, 48 },
	{ 60, 1, 1, 1, 0xffff, NET_CSUM, 0x10001, 48 },
};

static void test_lies(void)
{
	struct net_in f[NUM];

	for (int packed = 0; packed < 2; packed++)
		for (unsigned i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
			const struct lie *l = &lies[i];
			struct nic n;

			rx_init(&n, packed, 12, true);
			for (unsigned lap = 0; lap < 20; lap++) {
				deliver(&n, 60, 1, 1, 0, 0);
				/* Alone and behind a good one, which comes first. */
				CHECK_EQ(take(&n, f, NUM), 1);
				CHECK_EQ(net_rx_release(&n.rx), 0);
				if (lap & 1)
					deliver(&n, 60, 1, 1, 0, 0);
				deliver(&n, l->len, l->num_buffers, l->buffers, l->flags, l->start);
				if (lap & 1) {
					uint64_t whole = l->num_buffers > NUM ? NUM - 1 : 0;

					CHECK_EQ(take(&n, f, NUM), 1);
					CHECK_EQ(net_rx_release(&n.rx), 0);
					CHECK_EQ(take(&n, f, NUM), -EBADMSG);
					CHECK_EQ(n.rx.limit, whole ? whole : l->limit);
				} else {
					CHECK_EQ(take(&n, f, NUM), -EBADMSG);
					CHECK_EQ(n.rx.limit, l->limit);
				}
				CHECK_EQ(n.rx.fault, l->fault);
				CHECK_EQ(n.rx.value, l->value);
				CHECK(strlen(net_fault_text(n.rx.fault)) > 5);
				CHECK_EQ(net_rx_release(&n.rx), 0);
				CHECK_EQ(take(&n, f, NUM), 0);
				CHECK_EQ(n.r.dq.num_free, 0);
				CHECK_EQ(n.rx.dropped, lap + 1);
			}
			net_rx_destroy(&n.rx);
			nic_free(&n);
		}
}

static void test_too_long(void)
{
	struct net_in f[NUM];

	for (int packed = 0; packed < 2; packed++) {
		static const uint32_t lengths[] = { SLOT + 1, 0x7fffffff, 0xffffffff };
		struct nic n;
		struct seen s;

		rx_init(&n, packed, 12, true);
		for (unsigned i = 0; i < 3 * NUM; i++) {
			CHECK(dev_pop(&n.r, &s));
			dev_use(&n.r, &s, lengths[i % 3]);
			CHECK_EQ(take(&n, f, NUM), -EBADMSG);
			CHECK_EQ(n.rx.fault, NET_LONG);
			CHECK_EQ(n.rx.value, lengths[i % 3]);
			CHECK_EQ(n.rx.limit, SLOT);
			CHECK_EQ(net_rx_release(&n.rx), 0);
			CHECK_EQ(n.r.dq.num_free, 0);
		}
		/* An id of nothing that is out ends it. */
		dev_use_batch(&n.r, NUM + 5, 60, 1, 1);
		CHECK_EQ(take(&n, f, NUM), -EIO);
		CHECK_EQ(take(&n, f, NUM), -EIO);
		net_rx_destroy(&n.rx);
		nic_free(&n);
	}
}

/* Of buffers that together have more bytes than 32 bits count, none is read beyond what was allocated for it. */
static void test_more_than_4_gib(void)
{
	const uint32_t size = 1u << 31;
	struct net_slots slots = { .addr = ADDR, .size = size, .num = 3 };

	slots.host = mmap(NULL, 3 * (size_t)size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(slots.host != MAP_FAILED);
	for (int packed = 0; packed < 2; packed++) {
		struct options o = { .packed = packed, .num = NUM };
		struct net_header h = { .num_buffers = 2 };
		struct net_in f[NUM];
		struct net_rx rx;
		struct seen s[3];
		struct rig r;

		set_context(&o);
		rig_init(&r, &o);
		CHECK_EQ(net_rx_init(&rx, &r.dq, &slots, 12, true, -1), 0);
		CHECK_EQ(net_rx_fill(&rx), 0);
		for (uint16_t buffers = 2; buffers < 4; buffers++) {
			h.num_buffers = buffers;
			for (int i = 0; i < buffers; i++) {
				CHECK(dev_pop(&r, &s[i]));
				if (!i)
					memcpy(slots.host + (s[i].bufs[0].addr - ADDR), &h, sizeof(h));
			}
			for (int i = 0; i < buffers; i++)
				dev_use(&r, &s[i], i == 1 && buffers == 2 ? size - 1 : size);
			CHECK_EQ(net_rx_take(&rx, f, NUM), buffers == 2 ? 1 : -EBADMSG);
			if (buffers == 2)
				CHECK_EQ(f[0].len, UINT32_MAX - 12);
			else
				CHECK_EQ(rx.fault, NET_LONG);
			CHECK_EQ(net_rx_release(&rx), 0);
		}
		net_rx_destroy(&rx);
		rig_free(&r);
	}
	munmap(slots.host, 3 * (size_t)size);
}

/* Anything at all in lengths and headers: nothing is read or written outside, no buffer is lost. */
static void test_random(void)
{
	struct net_in f[NUM];

	for (int packed = 0; packed < 2; packed++) {
		struct nic n;

		rx_init(&n, packed, 12, true);
		for (unsigned lap = 0; lap < 20000; lap++) {
			unsigned some = rnd(NUM + 1);
			int rc;

			for (unsigned i = 0; i < some; i++) {
				struct seen s;
				uint8_t *p;

				CHECK(dev_pop(&n.r, &s));
				p = at(&n, s.bufs[0].addr);
				for (unsigned k = 0; k < 12; k++)
					p[k] = (uint8_t)rnd(rnd(4) ? 4 : 256);
				dev_use(&n.r, &s, rnd(8) ? rnd(SLOT + 1) : rnd(1u << 31));
			}
			while ((rc = take(&n, f, 1 + rnd(NUM)))) {
				for (int i = 0; i < rc; i++) {
					uint8_t *copy = malloc(f[i].len);

					net_rx_copy(&n.rx, &f[i], copy);
					if (f[i].header.flags & NET_HDR_F_NEEDS_CSUM)
						net_finish_csum(copy, f[i].len, &f[i].header);
					free(copy);
				}
				CHECK(rc != -EIO);
				CHECK_EQ(net_rx_release(&n.rx), 0);
			}
			CHECK_EQ(net_rx_release(&n.rx), 0);
			CHECK_EQ(n.r.dq.num_free, 0);
		}
		net_rx_destroy(&n.rx);
		nic_free(&n);
	}
}

static void test_csum(void)
{
	/* RFC 1071's example: 0001 f203 f4f5 f6f7 sums to ddf2. */
	uint8_t data[] = { 0xff, 0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7, 0, 0 };
	struct net_header h = { .csum_start = 1, .csum_offset = 8 };
	uint8_t zero[] = { 0xff, 0xff, 0, 0 };
	struct net_header hz = { .csum_start = 0, .csum_offset = 2 };

	net_finish_csum(data, sizeof(data), &h);
	CHECK_EQ(data[9], 0x22);
	CHECK_EQ(data[10], 0x0d);
	net_finish_csum(zero, sizeof(zero), &hz);
	CHECK_EQ(zero[2], 0xff);
	CHECK_EQ(zero[3], 0xff);
}

static int64_t in_ms(int64_t ms)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec + ms * 1000000;
}

static void test_pumps(void)
{
	uint8_t frame[60] = { 1, 2, 3 };
	int call = eventfd(0, EFD_NONBLOCK);

	for (int packed = 0; packed < 2; packed++) {
		struct net_pump p = { .frame = frame, .len = 60, .seq_at = 20, .seq = 7, .count = 100 };
		struct nic n;
		struct seen s;
		uint64_t seq;

		tx_init(&n, packed, 12);
		CHECK_EQ(net_tx_pump(&n.tx, &p, call, in_ms(20)), 0);
		CHECK_EQ(p.frames, NUM);
		CHECK_EQ(p.count, 100 - NUM);
		for (unsigned i = 0; i < NUM; i++) {
			CHECK(dev_pop(&n.r, &s));
			memcpy(&seq, at(&n, s.bufs[0].addr) + 12 + 20, 8);
			CHECK_EQ(seq, 7 + i);
		}
		p.len = 13;
		CHECK_EQ(net_tx_pump(&n.tx, &p, call, in_ms(20)), -EMSGSIZE);
		p.len = 60;
		p.seq_at = 53;
		CHECK_EQ(net_tx_pump(&n.tx, &p, call, in_ms(20)), -EMSGSIZE);
		net_tx_destroy(&n.tx);
		nic_free(&n);

		/* The same frame, another number; the same again; another frame. */
		p = (struct net_pump){ .frame = frame, .len = 60, .seq_at = 20, .seq = 7, .count = 9 };
		rx_init(&n, packed, 12, true);
		for (unsigned i = 0; i < 4; i++) {
			static const uint64_t numbers[] = { 7, 9, 9, 10 };
			uint8_t *b;

			CHECK(dev_pop(&n.r, &s));
			b = at(&n, s.bufs[0].addr);
			memset(b, 0, 12);
			memcpy(b + 12, frame, 60);
			memcpy(b + 32, &numbers[i], 8);
			if (i == 3)
				b[12 + 59] = 1;
			dev_use(&n.r, &s, 72);
		}
		CHECK_EQ(net_rx_pump(&n.rx, &p, call, in_ms(20)), 0);
		CHECK_EQ(p.frames, 3);
		CHECK_EQ(p.lost, 1);
		CHECK_EQ(p.repeated, 1);
		CHECK_EQ(p.others, 1);
		deliver(&n, 3, 1, 1, 0, 0);
		CHECK_EQ(net_rx_pump(&n.rx, &p, call, in_ms(20)), -EBADMSG);
		net_rx_destroy(&n.rx);
		nic_free(&n);
	}
	close(call);
}

int main(void)
{
	RUN(test_init);
	RUN(test_send);
	RUN(test_send_full);
	RUN(test_receive);
	RUN(test_lies);
	RUN(test_too_long);
	RUN(test_more_than_4_gib);
	RUN(test_random);
	RUN(test_csum);
	RUN(test_pumps);
	return 0;
}
