/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The dirty log: which bits a range sets, that none is set outside of the log, and that no page which a
 * device changed is without its bit when the driver can know of the change.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blk_request.h"
#include "device_rig.h"
#include "virtqueue_log.h"

#define PAGE (uint64_t)DIRTY_LOG_PAGE
#define GUARD 16u
#define GUARD_BYTE 0xa5

/* ---------------------------------------------------------- bits */

static uint8_t arena[GUARD + 64 + GUARD] __attribute__((aligned(16)));

static struct dirty_log log_new(uint64_t size, unsigned shift)
{
	memset(arena, GUARD_BYTE, sizeof(arena));
	memset(arena + GUARD + shift, 0, size);
	return (struct dirty_log){ arena + GUARD + shift, size };
}

static void guards_are_whole(const struct dirty_log *log)
{
	for (uint8_t *p = arena; p < arena + sizeof(arena); p++)
		CHECK((p >= log->map && p < log->map + log->size) || *p == GUARD_BYTE);
}

static bool is_marked(const struct dirty_log *log, uint64_t page)
{
	return page / 8 < log->size && log->map[page / 8] >> page % 8 & 1;
}

static void test_ranges(void)
{
	for (unsigned i = 0; i < 200000; i++) {
		struct dirty_log log = log_new(rnd(2) ? rnd(33) : 8 * rnd(5), rnd(2) ? rnd(8) : 0);
		uint64_t end = log.size * 8 * PAGE;
		uint64_t addr = rnd(33 * 8) * PAGE + rnd(PAGE), len = rnd(3) ? rnd(5 * PAGE) : rnd(end + PAGE);
		bool covered = !len || addr + len <= end;

		CHECK_EQ(dirty_log_covers(&log, addr, len), covered);
		CHECK_EQ(dirty_log_mark(&log, addr, len), covered);
		for (uint64_t page = 0; page < log.size * 8; page++) {
			bool want = covered && len && page >= addr / PAGE && page <= (addr + len - 1) / PAGE;

			CHECK_EQ(is_marked(&log, page), want);
		}
		guards_are_whole(&log);
	}
}

static void test_marks_add_up(void)
{
	struct dirty_log log = log_new(2, 3);

	CHECK(dirty_log_mark(&log, 2 * PAGE, 1));
	CHECK(dirty_log_mark(&log, 2 * PAGE + 7, 1));
	CHECK(dirty_log_mark(&log, 15 * PAGE, PAGE));
	CHECK_EQ(log.map[0], 1 << 2);
	CHECK_EQ(log.map[1], 1 << 7);
}

static void test_addresses_that_wrap(void)
{
	struct dirty_log log = log_new(8, 0);
	uint64_t const tops[] = { UINT64_MAX, UINT64_MAX - PAGE, 1ull << 63, 8 * 8 * PAGE };

	for (unsigned i = 0; i < 4; i++) {
		CHECK(!dirty_log_mark(&log, tops[i], 1));
		CHECK(!dirty_log_mark(&log, tops[i], 2 * PAGE));
		CHECK(!dirty_log_mark(&log, tops[i], UINT64_MAX));
		CHECK(!dirty_log_mark(&log, PAGE, tops[i]));
		CHECK(!dirty_log_covers(&log, PAGE, tops[i]));
	}
	for (unsigned i = 0; i < 8; i++)
		CHECK_EQ(log.map[i], 0);
	/* Of all memory there is; the sum that says where it ends does not fit. */
	log.size = 1ull << 49;
	CHECK(dirty_log_covers(&log, UINT64_MAX, 1));
	CHECK(!dirty_log_covers(&log, UINT64_MAX, 2));
	CHECK(dirty_log_limit(&log) == UINT64_MAX);
	guards_are_whole(&(struct dirty_log){ log.map, 8 });
}

static void test_host_pointers(void)
{
	/* One after the other in this process, but not for the guest; and another one far away. */
	static uint8_t memory[6 * DIRTY_LOG_PAGE], apart[DIRTY_LOG_PAGE];
	struct guest_region regions[] = {
		{ 20 * PAGE, 0x1000000, 2 * PAGE, memory },
		{ 10 * PAGE, 0x2000000, 3 * PAGE, memory + 2 * PAGE },
		{ 1000 * PAGE, 0x3000000, PAGE, apart },
	};
	struct dirty_log log = log_new(3, 1); /* 24 pages */
	struct guest_memory mem;
	uint64_t where;
	uint32_t bad;

	CHECK_EQ(guest_memory_init(&mem, regions, 3, &bad), 0);
	CHECK(dirty_log_mark_host(&log, &mem, memory + PAGE + 5, 2 * PAGE, &where));
	for (uint64_t page = 0; page < 24; page++)
		CHECK_EQ(is_marked(&log, page), page == 21 || page == 10 || page == 11);
	CHECK(!dirty_log_mark_host(&log, &mem, memory + 4 * PAGE, PAGE + 1, &where)); /* the end of memory */
	CHECK(is_marked(&log, 12));
	CHECK(!dirty_log_mark_host(&log, &mem, &bad, 1, &where));
	CHECK(!dirty_log_mark_host(&log, &mem, apart + 9, 1, &where)); /* the end of the log */
	CHECK_EQ(where, 1000 * PAGE + 9);
	CHECK(dirty_log_mark_host(&log, &mem, NULL, 0, &where));
	guards_are_whole(&log);
	guest_memory_destroy(&mem);
}

/* ---------------------------------------------------------- threads */

#define THREADS 4u
#define LOGGED (64u * 64u)

static uint64_t words[LOGGED / 64];
static uint32_t contents[LOGGED];

static void *marker(void *arg)
{
	struct dirty_log log = { (uint8_t *)words, sizeof(words) };
	uint32_t first = (uint32_t)(uintptr_t)arg;

	/* Neighbours are other threads': every byte of the log is fought for. */
	for (uint32_t page = first; page < LOGGED; page += THREADS) {
		contents[page] = page ^ 0x5a5a5a5a;
		CHECK(dirty_log_mark(&log, page * PAGE + 12, 4));
	}
	return NULL;
}

static void test_taken_while_marked(void)
{
	static bool seen[LOGGED];
	pthread_t threads[THREADS];
	unsigned taken = 0;

	memset(words, 0, sizeof(words));
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, marker, (void *)i), 0);
	while (taken < LOGGED) {
		for (uint32_t w = 0; w < LOGGED / 64; w++) {
			uint64_t bits = dirty_log_take(&words[w]);

			for (; bits; bits &= bits - 1) {
				uint32_t page = w * 64 + (uint32_t)__builtin_ctzll(bits);

				/* What was written before the mark is here; under TSan, without a race. */
				CHECK_EQ(contents[page], page ^ 0x5a5a5a5a);
				CHECK(!seen[page]);
				seen[page] = true;
				taken++;
			}
		}
	}
	for (unsigned i = 0; i < THREADS; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
}

/* ---------------------------------------------------------- queues */

/* Regions of the rig's table: buffers, and the two areas that a device writes. */
#define DATA_PAGES 64u
#define RING_PAGES 2u
#define DATA (0x100 * PAGE)
#define DESC (0x200 * PAGE)
#define USED (0x300 * PAGE)
#define ALL_PAGES 0x400u

static const char *format_name[2][2][2] = { { { "split", "split in_order" },
					      { "split event_idx", "split event_idx in_order" } },
					    { { "packed", "packed in_order" },
					      { "packed event_idx", "packed event_idx in_order" } } };

struct logged {
	struct rig r;
	struct guest_memory mem;
	uint8_t *area[3], *before[3];
	size_t size[3];
	uint8_t bits[ALL_PAGES / 8];
	struct virtqueue_log log;
};

static const uint64_t area_addr[3] = { DATA, DESC, USED };

static void logged_init(struct logged *l, struct options o)
{
	struct guest_region regions[3];
	struct virtqueue_areas areas;
	uint32_t bad;

	rig_init(&l->r, o);
	for (unsigned i = 0; i < 3; i++) {
		l->size[i] = (i ? RING_PAGES : DATA_PAGES) * PAGE;
		l->area[i] = aligned_alloc(PAGE, l->size[i]);
		l->before[i] = malloc(l->size[i]);
		memset(l->area[i], 0, l->size[i]);
		regions[i] = (struct guest_region){ area_addr[i], (i + 1) << 24, l->size[i], l->area[i] };
	}
	CHECK_EQ(guest_memory_init(&l->mem, regions, 3, &bad), 0);
	/* Where a page ends, so that they cross it. */
	areas.desc = l->area[1] + PAGE - 64;
	areas.avail = l->r.avail;
	areas.used = o.packed ? l->area[2] + 8 : l->area[2] + PAGE - 20;
	memcpy(areas.desc, l->r.desc, vring_desc_size(o.num));
	memcpy(areas.used, l->r.used, vring_device_size(o.num, o.packed));
	free(l->r.desc);
	free(l->r.used);
	l->r.desc = areas.desc;
	l->r.pdesc = areas.desc;
	l->r.used = areas.used;
	l->r.device = areas.used;
	virtqueue_set_memory(&l->r.vq, &l->mem, &areas);
	memset(l->bits, 0, sizeof(l->bits));
	l->log = (struct virtqueue_log){ .map = { l->bits, sizeof(l->bits) }, .ring = true, .fd = -1 };
}

static void logged_destroy(struct logged *l)
{
	l->r.desc = malloc(1);
	l->r.used = malloc(1);
	for (unsigned i = 0; i < 3; i++) {
		free(l->area[i]);
		free(l->before[i]);
	}
	guest_memory_destroy(&l->mem);
	rig_destroy(&l->r);
}

static bool bit(const struct logged *l, uint64_t page)
{
	return l->bits[page / 8] >> page % 8 & 1;
}

/* The driver has written what it wants to; what changes from here on is the device's doing. */
static void remember(struct logged *l)
{
	for (unsigned i = 0; i < 3; i++)
		memcpy(l->before[i], l->area[i], l->size[i]);
	memset(l->bits, 0, sizeof(l->bits));
}

static void every_change_is_marked(struct logged *l)
{
	for (unsigned i = 0; i < 3; i++)
		for (size_t at = 0; at < l->size[i]; at += PAGE)
			if (memcmp(l->before[i] + at, l->area[i] + at, PAGE))
				CHECK(bit(l, (area_addr[i] + at) / PAGE));
}

static int add(struct logged *l, uint64_t *at, uint32_t *len, unsigned n)
{
	struct piece p[4] = { { DATA, 16, 0 } };

	for (unsigned i = 0; i < n; i++) {
		at[i] = DATA + rnd(DATA_PAGES * PAGE - 3 * PAGE);
		len[i] = 1 + rnd(3 * PAGE);
		p[i + 1] = (struct piece){ at[i], len[i], W };
	}
	return rig_add(&l->r, p, n + 1);
}

/* The device writes the first `written` bytes. */
static void write_chain(const struct vhost_chain *c, uint32_t written)
{
	for (uint32_t i = c->out_num; written; i++) {
		uint32_t n = written < c->iov[i].iov_len ? written : (uint32_t)c->iov[i].iov_len;

		memset(c->iov[i].iov_base, 1 + (int)rnd(255), n);
		written -= n;
	}
}

static void every_way(void (*test)(struct options))
{
	for (unsigned bits = 0; bits < 8; bits++) {
		struct options o = { .packed = bits & 1, .event_idx = bits & 2, .in_order = bits & 4, .num = 32 };

		check_context = format_name[o.packed][o.event_idx][o.in_order];
		o.start = o.packed ? 20 : 0xfff0;
		test(o);
		if (o.packed)
			continue;
		/* And of a legacy driver in the other byte order. */
		o.swapped = true;
		test(o);
	}
	check_context = "";
}

static void changes(struct options o)
{
	static struct logged l;
	uint32_t len[3], id, used_len;
	uint64_t at[3];
	uint16_t used_id;

	logged_init(&l, o);
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), 0);
	for (unsigned round = 0; round < 5000; round++) {
		unsigned chains = 1 + rnd(4);

		for (unsigned i = 0; i < chains; i++)
			add(&l, at, len, rnd(4));
		remember(&l);
		if (rnd(2))
			virtqueue_disable_notification(&l.r.vq);
		every_change_is_marked(&l);
		remember(&l);
		while (virtqueue_pop(&l.r.vq, &l.r.chain) > 0) {
			uint32_t written = rnd(2) ? l.r.chain.in_len : rnd(l.r.chain.in_len + 1);

			write_chain(&l.r.chain, written);
			virtqueue_log_chain(&l.r.vq, &l.mem, &l.r.chain, written);
			id = l.r.chain.id;
			CHECK_EQ(virtqueue_fill(&l.r.vq, (uint16_t)id, written), 0);
			if (rnd(2))
				virtqueue_flush(&l.r.vq);
		}
		virtqueue_flush(&l.r.vq);
		every_change_is_marked(&l);
		remember(&l);
		if (rnd(2))
			virtqueue_enable_notification(&l.r.vq);
		every_change_is_marked(&l);
		CHECK_EQ(l.r.vq.report.fault, VQ_OK);
		while (rig_used(&l.r, &used_id, &used_len))
			;
	}
	logged_destroy(&l);
}

static void test_every_change_is_marked(void)
{
	every_way(changes);
}

static void exact(struct options o)
{
	static struct logged l;
	uint64_t ring_pages = 0;
	struct piece p[] = { { DATA, 16, 0 },
			     { DATA + 4 * PAGE + 100, 200, W },
			     { DATA + 10 * PAGE - 1, 2, W },
			     { DATA + 30 * PAGE, PAGE, W } };

	logged_init(&l, o);
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), 0);
	CHECK(l.log.changed);
	CHECK_EQ(rig_add(&l.r, p, 4) >= 0, true);
	remember(&l);
	l.log.changed = false;
	CHECK_EQ(virtqueue_pop(&l.r.vq, &l.r.chain), 1);
	for (unsigned i = 0; i < ALL_PAGES; i++)
		CHECK(!bit(&l, i));
	CHECK(!l.log.changed);
	/* 201 bytes are written: of the second buffer, the part that is on the page before. */
	virtqueue_log_chain(&l.r.vq, &l.mem, &l.r.chain, 201);
	for (unsigned i = 0; i < ALL_PAGES; i++)
		CHECK_EQ(bit(&l, i), i == DATA / PAGE + 4 || i == DATA / PAGE + 9);
	CHECK_EQ(virtqueue_push(&l.r.vq, l.r.chain.id, 201), 0);
	for (unsigned i = 0; i < ALL_PAGES; i++)
		if (bit(&l, i) && i / 0x100 != DATA / PAGE / 0x100)
			ring_pages |= 1ull << (i % 0x100) << (i / 0x100 == USED / PAGE / 0x100 ? 8 : 0);
	if (o.packed)
		/* Slot 20 is on the second page of the descriptors; nothing is written to the event area. */
		CHECK_EQ(ring_pages, 1 << 1);
	else
		/* idx on the first page of the used ring, element 16 on the second. */
		CHECK_EQ(ring_pages, 3 << 8);
	/* What a device writes without any chain. */
	remember(&l);
	virtqueue_log_write(&l.r.vq, DATA + 7 * PAGE, 1);
	CHECK(bit(&l, DATA / PAGE + 7));
	CHECK_EQ(l.r.vq.report.fault, VQ_OK);
	logged_destroy(&l);
}

static void test_exactly_what_was_written(void)
{
	every_way(exact);
}

/* A ring that is not logged, a log that is switched on between pop and push, and one that is off. */
static void on_the_fly(struct options o)
{
	static struct logged l;
	uint32_t len[3];
	uint64_t at[3];

	logged_init(&l, o);
	add(&l, at, len, 1);
	remember(&l);
	CHECK_EQ(virtqueue_pop(&l.r.vq, &l.r.chain), 1);
	write_chain(&l.r.chain, len[0]);
	l.log.ring = false;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), 0);
	CHECK(!l.log.changed);
	virtqueue_log_chain(&l.r.vq, &l.mem, &l.r.chain, len[0]);
	CHECK_EQ(virtqueue_push(&l.r.vq, l.r.chain.id, len[0]), 0);
	for (unsigned i = 0; i < ALL_PAGES; i++)
		CHECK_EQ(bit(&l, i), i >= at[0] / PAGE && i <= (at[0] + len[0] - 1) / PAGE);
	CHECK(!virtqueue_should_tell_log(&l.r.vq));
	l.log.fd = 7;
	CHECK(virtqueue_should_tell_log(&l.r.vq));
	CHECK(!virtqueue_should_tell_log(&l.r.vq));

	CHECK_EQ(virtqueue_set_log(&l.r.vq, NULL), 0);
	add(&l, at, len, 1);
	remember(&l);
	CHECK_EQ(virtqueue_pop(&l.r.vq, &l.r.chain), 1);
	virtqueue_log_chain(&l.r.vq, &l.mem, &l.r.chain, len[0]);
	virtqueue_log_write(&l.r.vq, DATA, 1);
	CHECK_EQ(virtqueue_push(&l.r.vq, l.r.chain.id, len[0]), 0);
	for (unsigned i = 0; i < ALL_PAGES; i++)
		CHECK(!bit(&l, i));
	CHECK(!virtqueue_should_tell_log(&l.r.vq));
	logged_destroy(&l);
}

static void test_on_the_fly(void)
{
	every_way(on_the_fly);
}

static void too_small(struct options o)
{
	static struct logged l;
	uint64_t area = o.packed ? sizeof(struct vring_packed_desc_event) : vring_device_size(o.num, false);
	struct piece p = { DATA + PAGE - 8, 16, W };

	logged_init(&l, o);
	/* The used area: given, it may be outside of memory, but its last byte has to be within the log. */
	l.log.map.size = 0x80; /* the data and the descriptors, not the used ring: pages below 0x400 - */
	l.log.used_given = true;
	l.log.used = 0x400 * PAGE - area;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), 0);
	l.log.used++;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), -ERANGE);
	CHECK(!l.r.vq.log);
	l.log.used = UINT64_MAX - 1;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), -ERANGE);
	l.log.used = 0;
	l.log.map.size = DESC / PAGE / 8;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), o.packed ? -ERANGE : 0);
	l.log.used_given = false;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), -ERANGE);
	l.log.map.size = 0;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), -ERANGE);

	/* A buffer: the ring breaks, and says where. */
	l.log.map.size = (DATA / PAGE + 1) / 8 + 1;
	memset(l.bits, 0, sizeof(l.bits));
	l.log.ring = false;
	CHECK_EQ(virtqueue_set_log(&l.r.vq, &l.log), 0);
	l.log.map.size = DATA / PAGE / 8;
	CHECK(rig_add(&l.r, &p, 1) >= 0);
	CHECK_EQ(virtqueue_pop(&l.r.vq, &l.r.chain), 1);
	virtqueue_log_chain(&l.r.vq, &l.mem, &l.r.chain, 16);
	CHECK_EQ(l.r.vq.report.fault, VQ_LOG_ADDRESS);
	CHECK_EQ(l.r.vq.report.value, DATA + PAGE - 8);
	CHECK_EQ(l.r.vq.report.limit, DATA);
	CHECK_EQ(l.r.vq.report.head, l.r.chain.id);
	CHECK_EQ(virtqueue_pop(&l.r.vq, &l.r.chain), -1);
	for (unsigned i = 0; i < sizeof(l.bits); i++)
		CHECK_EQ(l.bits[i], 0);
	logged_destroy(&l);
}

static void test_logs_too_small(void)
{
	every_way(too_small);
}

static void test_rings_in_no_region(void)
{
	struct options o = { .num = 8 };
	struct virtqueue_log log = { .map = { arena, sizeof(arena) }, .ring = true, .fd = -1 };
	static struct rig r;

	for (unsigned packed = 0; packed < 2; packed++) {
		o.packed = packed;
		rig_init(&r, o);
		log.used_given = false;
		CHECK_EQ(virtqueue_set_log(&r.vq, &log), -EFAULT);
		log.used_given = true;
		log.used = 0;
		CHECK_EQ(virtqueue_set_log(&r.vq, &log), packed ? -EFAULT : 0);
		rig_destroy(&r);
	}
}

/* ---------------------------------------------------------- block requests */

/* In the place of libc's: reads that give less than they were asked for, as a file may at any time. */
ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
	struct iovec some[VHOST_CHAIN_INLINE];
	int k = 1 + (int)rnd((uint32_t)n);

	memcpy(some, iov, (size_t)k * sizeof(*iov));
	some[k - 1].iov_len = 1 + rnd((uint32_t)some[k - 1].iov_len);
	return syscall(SYS_preadv, fd, some, k, offset, 0);
}

ssize_t pread(int fd, void *buf, size_t n, off_t offset)
{
	return syscall(SYS_pread64, fd, buf, (size_t)1 + rnd((uint32_t)n), offset);
}

/* The request eats its iovecs; those that it wrote to must be whole again to be marked. */
static void test_block_requests_leave_their_iovecs(void)
{
	static uint8_t in[64 * 512 + 64];
	struct blk_req_header header = { BLK_T_IN, 0, 0 };
	int fd = memfd_create("disk", MFD_CLOEXEC);
	struct blk_disk disk = { .fd = fd, .capacity = 1024, .serial = "a serial number" };
	static const uint32_t types[] = { BLK_T_IN, BLK_T_IN, BLK_T_IN, BLK_T_GET_ID, BLK_T_FLUSH, 77 };

	for (unsigned round = 0; round < 20000; round++) {
		uint32_t total = rnd(3) ? 512 * (1 + rnd(63)) + 1 : 1 + rnd(600), written = 0;
		struct iovec before[VHOST_CHAIN_INLINE];
		struct blk_request r = { 0 };
		struct vhost_chain *c = &r.chain;
		size_t at = 0;

		CHECK_EQ(ftruncate(fd, rnd(40 * 512)), 0); /* it may end within the request */
		vhost_chain_init(c);
		header.type = types[rnd(6)];
		header.sector = rnd(10);
		c->out_num = 1;
		c->out_len = sizeof(header);
		c->iov[0] = (struct iovec){ &header, sizeof(header) };
		while (at < total && c->in_num < VHOST_CHAIN_INLINE - 2) {
			uint32_t n = 1 + rnd(total - (uint32_t)at);

			c->iov[1 + c->in_num++] = (struct iovec){ in + at, n };
			at += n;
		}
		if (at < total)
			c->iov[1 + c->in_num++] = (struct iovec){ in + at, total - at };
		c->in_len = total;
		memcpy(before, c->iov, sizeof(before));
		CHECK_EQ(blk_request_parse(&disk, &r, false), VQ_OK);
		if (r.todo != BLK_NOTHING)
			blk_request_run(&disk, &r);
		written = blk_request_end(&r);
		CHECK(written >= 1 && written <= total);
		CHECK(!memcmp(before + 1, c->iov + 1, c->in_num * sizeof(*before)));
		vhost_chain_destroy(c);
	}
	close(fd);
}

int main(void)
{
	RUN(test_ranges);
	RUN(test_marks_add_up);
	RUN(test_addresses_that_wrap);
	RUN(test_host_pointers);
	RUN(test_taken_while_marked);
	RUN(test_every_change_is_marked);
	RUN(test_exactly_what_was_written);
	RUN(test_on_the_fly);
	RUN(test_logs_too_small);
	RUN(test_rings_in_no_region);
	RUN(test_block_requests_leave_their_iovecs);
	return 0;
}
