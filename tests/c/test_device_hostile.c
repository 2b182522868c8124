/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side against drivers that break the rules, one rule at a time and all at once. Guest
 * memory is what malloc gave, region by region, so that ASan sees every byte too far.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "virtqueue.h"

#define NUM 8u
#define REGIONS 3u
#define REGION_SIZE 0x1000u
/* The first two touch each other in guest addresses, the third is apart. */
static const uint64_t region_addr[REGIONS] = { 0x10000, 0x11000, 0x80000 };

struct rig {
	struct guest_memory mem;
	uint8_t *host[REGIONS];
	struct virtqueue vq;
	struct vring_desc *desc; /* the same 16 bytes in both formats */
	struct vring_packed_desc *pdesc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct vhost_chain chain;
	bool packed;
};

static void rig_init(struct rig *r, bool packed, bool indirect, bool event_idx, bool in_order)
{
	struct guest_region regions[REGIONS];
	struct virtqueue_config cfg = { 0 };
	uint32_t bad;

	memset(r, 0, sizeof(*r));
	for (unsigned i = 0; i < REGIONS; i++) {
		r->host[i] = calloc(1, REGION_SIZE);
		regions[i] = (struct guest_region){ region_addr[i], region_addr[i] + (1 << 20),
						    REGION_SIZE, r->host[i] };
	}
	CHECK_EQ(guest_memory_init(&r->mem, regions, REGIONS, &bad), 0);
	r->packed = packed;
	r->desc = calloc(NUM, 16);
	r->pdesc = (void *)r->desc;
	r->avail = calloc(1, vring_driver_size(NUM, packed));
	r->used = calloc(1, vring_device_size(NUM, packed));
	cfg.areas = (struct virtqueue_areas){ r->desc, r->avail, r->used };
	cfg.mem = &r->mem;
	cfg.num = NUM;
	cfg.base = packed ? 0x80008000 : 0;
	cfg.packed = packed;
	cfg.indirect = indirect;
	cfg.event_idx = event_idx;
	cfg.in_order = in_order;
	CHECK_EQ(virtqueue_init(&r->vq, &cfg), 0);
	vhost_chain_init(&r->chain);
}

static void rig_destroy(struct rig *r)
{
	vhost_chain_destroy(&r->chain);
	virtqueue_destroy(&r->vq);
	guest_memory_destroy(&r->mem);
	for (unsigned i = 0; i < REGIONS; i++)
		free(r->host[i]);
	free(r->desc);
	free(r->avail);
	free(r->used);
}

/* Descriptor `i`, in either format; `id_next` is the packed buffer id, or the split next. Packed:
 * available in the first round. */
static void put(struct rig *r, unsigned i, uint64_t addr, uint32_t len, uint16_t flags,
		uint16_t id_next)
{
	if (r->packed)
		r->pdesc[i] = (struct vring_packed_desc){ addr, len, id_next,
							  flags | VRING_PACKED_DESC_F_AVAIL };
	else
		r->desc[i] = (struct vring_desc){ addr, len, flags, id_next };
}

static void offer(struct rig *r, uint16_t head)
{
	if (!r->packed)
		r->avail->ring[r->avail->idx++ % NUM] = head;
}

static void expect(struct rig *r, enum virtqueue_fault fault)
{
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), -1);
	CHECK_EQ(r->vq.report.fault, fault);
	/* Sticky, whatever is repaired afterwards. */
	memset(r->desc, 0, NUM * 16);
	CHECK_EQ(virtqueue_pop(&r->vq, &r->chain), -1);
	CHECK_EQ(r->vq.report.fault, fault);
	CHECK(!virtqueue_has_work(&r->vq));
	rig_destroy(r);
}

#define N VRING_DESC_F_NEXT
#define W VRING_DESC_F_WRITE
#define I VRING_DESC_F_INDIRECT

static void one(bool packed, uint64_t addr, uint32_t len, uint16_t flags, enum virtqueue_fault fault)
{
	struct rig r;

	rig_init(&r, packed, false, false, false);
	put(&r, 0, addr, len, flags, 0);
	offer(&r, 0);
	expect(&r, fault);
}

static void test_one_descriptor(void)
{
	for (int packed = 0; packed < 2; packed++) {
		check_context = packed ? "packed" : "split";
		one(packed, 0x10000, 0, 0, VQ_LENGTH_ZERO);
		one(packed, 0xffff, 1, 0, VQ_ADDRESS);
		one(packed, 0x12000, 1, 0, VQ_ADDRESS);
		one(packed, 0x11fff, 2, W, VQ_ADDRESS);
		one(packed, 0x10000, 0x2001, W, VQ_ADDRESS);
		one(packed, ~0ull - 3, 16, 0, VQ_ADDRESS);
		one(packed, 0x10000, 0xffffffff, W, VQ_ADDRESS);
		one(packed, 0x10000, 16, I, VQ_INDIRECT_DISABLED);
	}
}

static void table(bool packed, uint32_t len, uint16_t flags, const struct vring_desc *entries,
		  unsigned n, enum virtqueue_fault fault)
{
	struct rig r;

	rig_init(&r, packed, true, false, false);
	/* Right up to the end of a region: the table may not be read beyond. */
	for (unsigned i = 0; i < n; i++)
		memcpy(r.host[1] + REGION_SIZE - (n - i) * 16, &entries[i], 16);
	put(&r, 0, 0x12000 - n * 16, len, I | flags, 0);
	offer(&r, 0);
	if (fault) {
		expect(&r, fault);
		return;
	}
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
	CHECK_EQ(r.chain.ndesc, 1);
	rig_destroy(&r);
}

static void test_tables(void)
{
	struct vring_desc ok[2] = { { 0x10000, 16, N, 1 }, { 0x10100, 16, W, 0 } };
	struct vring_desc far[1] = { { 0x10000, 16, N, 7 } };
	struct vring_desc loop[2] = { { 0x10000, 16, N, 1 }, { 0x10100, 16, N, 0 } };
	/* The same in the packed format: flags are the last field. */
	struct vring_desc pok[2] = { { 0x10000, 16, 0, 0 }, { 0x10100, 16, 0, W } };
	struct vring_desc nested[1] = { { 0x10000, 16, I, 0 } };
	/* The device ignores all flags but WRITE there (2.8.7). */
	struct vring_desc podd[2] = { { 0x10000, 16, 0, I | N | 0x8080 }, { 0x10100, 16, 0, I | W } };

	check_context = "split";
	table(false, 32, 0, ok, 2, VQ_OK);
	table(false, 0, 0, ok, 2, VQ_INDIRECT_LENGTH);
	table(false, 24, 0, ok, 2, VQ_INDIRECT_LENGTH);
	table(false, 32, N, ok, 2, VQ_INDIRECT_NEXT);
	table(false, 16, 0, nested, 1, VQ_INDIRECT_NESTED);
	table(false, 16, 0, far, 1, VQ_NEXT_RANGE);
	table(false, 128, 0, far, 1, VQ_ADDRESS);
	table(false, 32, 0, loop, 2, VQ_CHAIN_TOO_LONG);
	check_context = "packed";
	table(true, 32, 0, pok, 2, VQ_OK);
	table(true, 0, 0, pok, 2, VQ_INDIRECT_LENGTH);
	table(true, 24, 0, pok, 2, VQ_INDIRECT_LENGTH);
	table(true, 32, N, pok, 2, VQ_INDIRECT_NEXT);
	table(true, 32, 0, podd, 2, VQ_OK);
	table(true, 48, 0, pok, 2, VQ_ADDRESS);
	table(true, 0xfffffff0, 0, pok, 2, VQ_CHAIN_TOO_LONG);
}

static void test_split_ring(void)
{
	struct rig r;

	check_context = "split";
	rig_init(&r, false, false, false, false);
	r.avail->idx = NUM + 1;
	expect(&r, VQ_AVAIL_JUMP);

	rig_init(&r, false, false, false, false);
	offer(&r, NUM);
	expect(&r, VQ_HEAD_RANGE);

	rig_init(&r, false, false, false, false);
	put(&r, 0, 0x10000, 1, N, NUM);
	offer(&r, 0);
	expect(&r, VQ_NEXT_RANGE);

	rig_init(&r, false, false, false, false);
	put(&r, 0, 0x10000, 1, N, 0);
	offer(&r, 0);
	expect(&r, VQ_CHAIN_TOO_LONG);

	rig_init(&r, false, false, false, false);
	put(&r, 0, 0x10000, 1, W | N, 1);
	put(&r, 1, 0x10000, 1, 0, 0);
	offer(&r, 0);
	expect(&r, VQ_WRITE_BEFORE_READ);

	/* The first is served, its double is not. */
	rig_init(&r, false, false, false, false);
	put(&r, 0, 0x10000, 1, 0, 0);
	offer(&r, 0);
	offer(&r, 0);
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
	expect(&r, VQ_HEAD_BUSY);
}

static void test_packed_ring(void)
{
	struct rig r;

	check_context = "packed";
	/* Slots of the wrong round are simply not there. */
	rig_init(&r, true, false, false, false);
	r.pdesc[0].flags = VRING_PACKED_DESC_F_USED;
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 0);
	r.pdesc[0].flags = VRING_PACKED_DESC_F_USED | VRING_PACKED_DESC_F_AVAIL;
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 0);
	rig_destroy(&r);

	rig_init(&r, true, false, false, false);
	put(&r, 0, 0x10000, 1, N, 0);
	expect(&r, VQ_CHAIN_OPEN);

	rig_init(&r, true, false, false, false);
	for (unsigned i = 0; i < NUM; i++)
		put(&r, i, 0x10000, 1, N, 0);
	expect(&r, VQ_CHAIN_TOO_LONG);

	rig_init(&r, true, false, false, false);
	put(&r, 0, 0x10000, 1, 0, NUM);
	expect(&r, VQ_ID_RANGE);

	rig_init(&r, true, false, false, false);
	put(&r, 0, 0x10000, 1, 0, 3);
	put(&r, 1, 0x10000, 1, 0, 3);
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
	expect(&r, VQ_ID_BUSY);
}

static void test_more_than_4_gib(void)
{
	struct guest_region region = { 0, 0, 1ull << 33, NULL };
	struct guest_memory mem;
	struct rig r;
	uint32_t bad;

	for (int packed = 0; packed < 2; packed++) {
		check_context = packed ? "packed" : "split";
		rig_init(&r, packed, false, false, false);
		region.host = r.host[0]; /* addresses are computed, never touched */
		CHECK_EQ(guest_memory_init(&mem, &region, 1, &bad), 0);
		virtqueue_set_memory(&r.vq, &mem,
				     &(struct virtqueue_areas){ r.desc, r.avail, r.used });
		put(&r, 0, 0, 0xffffffff, N, packed ? 0 : 1);
		put(&r, 1, 0, 1, W, 0);
		offer(&r, 0);
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), -1);
		CHECK_EQ(r.vq.report.fault, VQ_LENGTH_TOTAL);
		guest_memory_destroy(&mem);
		rig_destroy(&r);
	}
}

/* ------------------------------------------------------------------ all at once */

static uint64_t seed = 88172645463325252ull;

static uint32_t rnd(uint32_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)((seed >> 11) % below);
}

static uint64_t some_addr(void)
{
	static const uint64_t odd[] = { 0, ~0ull, 0x11ff8, 0x12000, 0xfff0, 0x80ff0 };

	return rnd(4) ? region_addr[rnd(REGIONS)] + rnd(REGION_SIZE) : odd[rnd(6)];
}

static void scribble(struct rig *r)
{
	uint16_t flags = rnd(8) | (rnd(2) ? VRING_PACKED_DESC_F_AVAIL : 0) |
			 (rnd(4) ? 0 : VRING_PACKED_DESC_F_USED);
	uint32_t len = rnd(3) ? 16 * rnd(6) : rnd(2) ? rnd(0x3000) : 0xffffffff;
	uint8_t *table = r->host[rnd(REGIONS)] + 16 * rnd(REGION_SIZE / 16);
	struct vring_desc d = { some_addr(), len, rnd(16), rnd(NUM + 1) };

	memcpy(table, &d, sizeof(d));
	put(r, rnd(NUM), some_addr(), len, flags, rnd(rnd(16) ? NUM : 65536));
	if (r->packed)
		return;
	r->avail->ring[rnd(NUM)] = rnd(rnd(16) ? NUM : 65536);
	r->avail->idx += rnd(rnd(8) ? 3 : 20);
}

/* Every byte that the chain offers is there. */
static void touch(const struct vhost_chain *c)
{
	uint64_t out = 0, in = 0;

	for (uint32_t i = 0; i < c->out_num + c->in_num; i++) {
		uint8_t *p = c->iov[i].iov_base;

		CHECK(c->iov[i].iov_len > 0);
		*(i < c->out_num ? &out : &in) += c->iov[i].iov_len;
		if (i < c->out_num)
			CHECK(p[0] + p[c->iov[i].iov_len - 1] >= 0);
		else
			p[0] = p[c->iov[i].iov_len - 1] = 0x5a;
	}
	CHECK_EQ(out, c->out_len);
	CHECK_EQ(in, c->in_len);
}

static void noise(bool packed, bool indirect, bool event_idx, bool in_order)
{
	struct rig r;
	uint16_t out[NUM];
	unsigned nout = 0, faults = 0, chains = 0;

	rig_init(&r, packed, indirect, event_idx, in_order);
	for (int round = 0; round < 20000; round++) {
		int rc;

		scribble(&r);
		rc = virtqueue_pop(&r.vq, &r.chain);
		if (rc < 0) {
			CHECK(r.vq.report.fault > VQ_OK && r.vq.report.fault < VQ_FAULTS);
			faults++;
			rig_destroy(&r);
			rig_init(&r, packed, indirect, event_idx, in_order);
			nout = 0;
			continue;
		}
		if (rc) {
			chains++;
			touch(&r.chain);
			CHECK(r.vq.inuse <= NUM);
			CHECK(nout < NUM);
			if (rnd(8) || virtqueue_unpop(&r.vq, &r.chain))
				out[nout++] = r.chain.id;
		}
		while (nout && rnd(2)) {
			unsigned i = rnd(nout);

			CHECK_EQ(virtqueue_push(&r.vq, out[i], 0), 0);
			CHECK_EQ(virtqueue_fill(&r.vq, out[i], 0), -22);
			out[i] = out[--nout];
		}
		CHECK_EQ(virtqueue_fill(&r.vq, NUM, 0), -22);
		virtqueue_should_notify(&r.vq);
		if (rnd(2))
			virtqueue_enable_notification(&r.vq);
		else
			virtqueue_disable_notification(&r.vq);
	}
	rig_destroy(&r);
	CHECK(faults > 100);
	CHECK(chains > 100);
}

static void test_noise(void)
{
	for (unsigned i = 0; i < 16; i++) {
		check_context = i & 1 ? "packed" : "split";
		noise(i & 1, i & 2, i & 4, i & 8);
	}
}

int main(void)
{
	RUN(test_one_descriptor);
	RUN(test_tables);
	RUN(test_split_ring);
	RUN(test_packed_ring);
	RUN(test_more_than_4_gib);
	RUN(test_noise);
	return 0;
}
