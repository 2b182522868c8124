/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side at its limits: the largest rings, the last address, as many pieces of memory as a
 * chain may have, and as many slots as a ring has.
 */
#include "device_rig.h"

static void test_largest_rings(void)
{
	for (int packed = 0; packed < 2; packed++) {
		uint32_t nums[] = { 32768, packed ? 32767 : 16384 };

		for (unsigned n = 0; n < 2; n++) {
			uint32_t num = nums[n], bad;
			struct guest_region region = { 0, 0, 1, malloc(1) };
			struct vring_desc *desc = calloc(num, 16);
			struct vring_packed_desc *pdesc = (void *)desc;
			struct vring_avail *avail = calloc(1, vring_driver_size(num, packed));
			void *used = calloc(1, vring_device_size(num, packed));
			struct virtqueue_config cfg = { .areas = { desc, avail, used },
							.num = num,
							.base = packed ? 0x80008000 : 0,
							.packed = packed };
			struct guest_memory mem;
			struct vhost_chain c;
			struct virtqueue vq;

			check_context = packed ? "packed" : "split";
			CHECK_EQ(guest_memory_init(&mem, &region, 1, &bad), 0);
			cfg.mem = &mem;
			CHECK_EQ(virtqueue_init(&vq, &cfg), 0);
			vhost_chain_init(&c);
			/* One chain of all there is. */
			for (uint32_t i = 0; i < num; i++) {
				uint16_t flags = i + 1 < num ? N : 0;

				if (packed)
					pdesc[i] = (struct vring_packed_desc){
						0, 1, 9, flags | VRING_PACKED_DESC_F_AVAIL };
				else
					desc[i] = (struct vring_desc){ 0, 1, flags, i + 1 };
			}
			if (!packed)
				avail->idx = 1;
			CHECK_EQ(virtqueue_pop(&vq, &c), 1);
			CHECK_EQ(c.ndesc, num);
			CHECK_EQ(c.out_num, num);
			CHECK_EQ(virtqueue_pop(&vq, &c), 0);
			CHECK_EQ(virtqueue_push(&vq, c.id, 0), 0);
			CHECK_EQ(virtqueue_base(&vq), packed ? 0 : 1);
			vhost_chain_destroy(&c);
			virtqueue_destroy(&vq);
			guest_memory_destroy(&mem);
			free(region.host);
			free(desc);
			free(avail);
			free(used);
		}
	}
}

/* The rig's own memory is not what the queue sees then. */
static void use_memory(struct rig *r, struct guest_memory *mem)
{
	struct virtqueue_areas areas = { r->desc, r->avail, r->used };

	virtqueue_set_memory(&r->vq, mem, &areas);
}

/* Behind the last address there is nothing, although there is something at 0. */
static void end_of_all_addresses(bool packed, bool table, bool beyond)
{
	uint8_t *first = calloc(1, 64);
	struct vring_desc *last = calloc(2, sizeof(*last));
	struct guest_region regions[2] = { { 0, 0, 64, first },
					   { ~0ull - 31, ~0ull - 31, 32, (uint8_t *)last } };
	struct piece p = { ~0ull - 31, beyond ? 48 : 32, table ? I : 0 };
	struct guest_memory mem;
	struct rig r;
	uint32_t bad;

	CHECK_EQ(guest_memory_init(&mem, regions, 2, &bad), 0);
	rig_init(&r, (struct options){ .packed = packed, .num = 8, .indirect = true });
	use_memory(&r, &mem);
	/* In a packed table the last two fields are id and flags, and no flags are good ones. */
	for (uint16_t i = 0; i < 2; i++)
		last[i] = (struct vring_desc){ 0, 1, !packed && i < 1 + beyond ? N : 0,
					       packed ? 0 : i + 1 };
	*(struct vring_desc *)first = (struct vring_desc){ 0, 1, 0, 0 }; /* the third of a table */
	CHECK(rig_add(&r, &p, 1) >= 0);
	CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), beyond ? -1 : 1);
	CHECK_EQ(r.vq.report.fault, beyond ? VQ_ADDRESS : VQ_OK);
	rig_destroy(&r);
	guest_memory_destroy(&mem);
	free(first);
	free(last);
}

static void test_the_end_of_all_addresses(void)
{
	for (int i = 0; i < 8; i++) {
		check_context = i & 1 ? "packed" : "split";
		end_of_all_addresses(i & 1, i & 2, i & 4);
	}
}

/* A driver that offers a chain again and again, and a device that fills and does not publish: what it
 * has staged stays within the ring. */
static void test_offered_again_before_it_is_published(void)
{
	static const struct piece p[2] = { { 0x10000, 16, 0 }, { 0x10100, 16, W } };

	for (int packed = 0; packed < 2; packed++) {
		unsigned popped = 0;
		struct rig r;

		check_context = packed ? "packed" : "split";
		rig_init(&r, (struct options){ .packed = packed, .num = 8 });
		for (;;) {
			CHECK(rig_add(&r, p, 2) >= 0);
			if (virtqueue_pop(&r.vq, &r.chain) < 0)
				break;
			CHECK_EQ(virtqueue_fill(&r.vq, r.chain.id, 0), 0);
			CHECK(++popped <= 4);
			/* The driver forgets that it ever added it. */
			r.free = 8;
			memset(r.slots, 0, sizeof(r.slots));
			memset(r.busy, 0, sizeof(r.busy));
		}
		CHECK_EQ(popped, 4);
		CHECK_EQ(r.vq.report.fault, VQ_CHAIN_TOO_LONG);
		virtqueue_flush(&r.vq);
		CHECK_EQ(r.vq.inuse, 0);
		if (!packed)
			CHECK_EQ(r.used->idx, 4);
		rig_destroy(&r);
	}
}

/* Buffers over many regions: a chain holds a reasonable number of pieces, not as many as it can name. */
static void many_pieces(bool packed, unsigned each)
{
	enum { TINY = 500, ENTRIES = 1024 };
	static struct vring_desc entries[ENTRIES];
	static uint8_t tiny[TINY];
	struct piece p = { 0x10000, sizeof(entries), I };
	struct guest_region regions[TINY + 1];
	struct guest_memory mem;
	struct rig r;
	uint32_t bad;

	/* Bytes that border each other in guest addresses only, and the table. */
	for (unsigned i = 0; i < TINY; i++)
		regions[i] = (struct guest_region){ i, 2 * i, 1, tiny + (TINY - 1 - i) };
	regions[TINY] = (struct guest_region){ 0x10000, 0x10000, sizeof(entries),
					       (uint8_t *)entries };
	CHECK_EQ(guest_memory_init(&mem, regions, TINY + 1, &bad), 0);
	rig_init(&r, (struct options){ .packed = packed, .num = 8, .indirect = true });
	use_memory(&r, &mem);
	for (unsigned i = 0; i < ENTRIES; i++)
		entries[i] = (struct vring_desc){ 0, each, packed || i + 1 == ENTRIES ? 0 : N,
						  packed ? 0 : i + 1 };
	CHECK(rig_add(&r, &p, 1) >= 0);
	if (each > 2) {
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), -1);
		CHECK_EQ(r.vq.report.fault, VQ_TOO_MANY_PIECES);
	} else {
		CHECK_EQ(virtqueue_pop(&r.vq, &r.chain), 1);
		CHECK_EQ(r.chain.out_num, ENTRIES * each);
		CHECK_EQ(r.chain.out_len, ENTRIES * each);
	}
	CHECK(r.chain.spill_cap <= 2 * ENTRIES);
	rig_destroy(&r);
	guest_memory_destroy(&mem);
}

static void test_many_pieces(void)
{
	for (int packed = 0; packed < 2; packed++) {
		check_context = packed ? "packed" : "split";
		many_pieces(packed, 1);
		many_pieces(packed, 2);
		many_pieces(packed, 3);
		many_pieces(packed, 500);
	}
}

int main(void)
{
	RUN(test_largest_rings);
	RUN(test_the_end_of_all_addresses);
	RUN(test_offered_again_before_it_is_published);
	RUN(test_many_pieces);
	return 0;
}
