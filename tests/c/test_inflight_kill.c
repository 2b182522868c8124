/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A device that is killed at every instruction. It runs in a child that is stepped through whatever it
 * does to a ring; whenever an instruction changed the ring or its in-flight region, a successor starts on
 * a copy of both, and must find each chain that the driver knows to be out exactly once: used, or in
 * flight in the order in which it was popped, or still available. It then completes them all. Every now
 * and then the child is killed for good and the next one goes on with what it left, start included.
 *
 * Driver and device are those of device_rig.h; everything that outlives the device is in one arena.
 */
#define _GNU_SOURCE /* sched_setaffinity */
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device_rig.h"
#include "inflight.h"

#define NUM_MAX 16u
#define TABLES 64u /* of 4 descriptors, in the third region of guest memory */
#define REGION_MAX 1024u
#ifdef __SANITIZE_ADDRESS__
#define INSTANTS 200
#else
#define INSTANTS 800 /* to look at, for each kind of ring */
#endif
#define KILL_EVERY 100 /* instants, on average */

struct arena {
	/* What the device writes to: compared and copied at each instruction. */
	struct {
		_Alignas(64) uint8_t region[REGION_MAX];
		_Alignas(16) uint8_t desc[16 * NUM_MAX];
		_Alignas(16) uint8_t avail[6 + 2 * NUM_MAX];
		_Alignas(16) uint8_t used[6 + 8 * NUM_MAX];
	} shared;
	struct rig rig; /* the driver's state; `vq` and `chain` are the device's, in its own memory */
	uint32_t desc_num;
	bool in_device;
	uint64_t serial; /* chains made so far */
	uint64_t pops;
	/* Per id, of the chain that is out. */
	uint64_t addr[NUM_MAX];	  /* of its first buffer, its own */
	uint64_t popped[NUM_MAX]; /* when it was popped first; 0: it was not */
	uint8_t table[NUM_MAX];
	uint64_t tables;   /* those that are in use */
	bool is_successor; /* half of the tables are for the child, half for what is tried on copies */
	uint64_t deaths;	  /* kills for good */
};

static struct arena *arena;
static uint8_t *tables;

static void point(struct rig *r, struct arena *a)
{
	r->desc = (void *)a->shared.desc;
	r->pdesc = (void *)a->shared.desc;
	r->avail = (void *)a->shared.avail;
	r->used = (void *)a->shared.used;
	r->driver = (void *)a->shared.avail;
	r->device = (void *)a->shared.used;
}

static void arena_init(struct options o, uint32_t desc_num)
{
	struct rig first;

	CHECK(o.num <= NUM_MAX && inflight_region_size(desc_num, o.packed) <= REGION_MAX);
	memset(arena, 0, sizeof(*arena));
	rig_init(&first, o);
	memcpy(arena->shared.desc, first.desc, 16 * o.num);
	memcpy(arena->shared.avail, first.avail, vring_driver_size(o.num, o.packed));
	memcpy(arena->shared.used, first.used, vring_device_size(o.num, o.packed));
	virtqueue_destroy(&first.vq);
	free(first.desc);
	free(first.avail);
	free(first.used);
	/* Written by the child, read by whoever looks: what is private would be copied on write. */
	tables = first.mem.by_guest[2].host = mmap(NULL, REGION_SIZE, PROT_READ | PROT_WRITE,
						   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(tables != MAP_FAILED);
	arena->rig = first;
	arena->desc_num = desc_num;
	point(&arena->rig, arena);
}

static void arena_end(void)
{
	guest_memory_destroy(&arena->rig.mem);
	munmap(tables, REGION_SIZE);
	for (unsigned i = 0; i < REGIONS; i++)
		free(arena->rig.host[i]);
}

/* A front-end that cannot know where a dead device was says what QEMU does: the used index of a split
 * ring, and of a packed one the position that it heard last, long ago. */
static int device_init(struct arena *a, struct virtqueue *vq)
{
	struct rig *r = &a->rig;
	struct virtqueue_config cfg = rig_config(r, r->o.packed ? (r->o.start | 0x8000u) * 0x10001u :
								  ORD16(r, r->used->idx));

	cfg.inflight = a->shared.region;
	cfg.inflight_num = a->desc_num;
	return virtqueue_init(vq, &cfg);
}

/* ---------------------------------------------------------- the driver */

static void driver_add(struct arena *a, uint32_t (*chance)(uint32_t))
{
	struct rig *r = &a->rig;
	uint64_t addr = region_addr[0] + a->serial % 128 * 16;
	unsigned n = 1 + chance(4), in = chance(n + 1), table = a->is_successor ? TABLES / 2 : 0;
	struct piece p[4];
	int id;

	for (unsigned i = 0; i < n; i++)
		p[i] = (struct piece){ addr + i, 1 + chance(8), i >= n - in ? W : 0 };
	while (a->tables >> table & 1)
		table++;
	if (r->o.indirect && chance(2)) {
		struct vring_desc *d = (void *)(tables + table * 64);

		for (unsigned i = 0; i < n; i++) {
			d[i] = (struct vring_desc){ p[i].addr, p[i].len, p[i].flags, 0 };
			if (!r->o.packed && i + 1 < n)
				d[i] = (struct vring_desc){ p[i].addr, p[i].len, p[i].flags | N, i + 1 };
		}
		p[0] = (struct piece){ region_addr[2] + table * 64, n * 16, I };
		n = 1;
	}
	id = rig_add(r, p, n);
	if (id < 0)
		return;
	a->serial++;
	a->table[id] = table;
	a->tables |= 1ull << table;
	a->addr[id] = addr;
	a->popped[id] = 0;
}

static void driver_reap(struct arena *a)
{
	uint16_t id;
	uint32_t len;

	while (rig_used(&a->rig, &id, &len)) { /* checks that it was out */
		a->popped[id] = 0;
		a->tables &= ~(1ull << a->table[id]);
	}
}

/* ---------------------------------------------------------- the successor, on a copy */

static uint32_t out(const struct arena *a)
{
	uint32_t n = 0;

	for (unsigned id = 0; id < a->rig.o.num; id++)
		n += a->rig.slots[id] > 0;
	return n;
}

static void complete(struct arena *a, struct virtqueue *vq, uint16_t *ids, uint32_t n)
{
	while (n) {
		uint32_t i = rnd(n);

		CHECK_EQ(virtqueue_fill(vq, ids[i], 0), 0);
		ids[i] = ids[--n];
		if (!n || !rnd(3))
			virtqueue_flush(vq);
		if (!rnd(3))
			driver_reap(a);
	}
	driver_reap(a);
	CHECK_EQ(out(a), 0);
	CHECK_EQ(a->rig.free, a->rig.o.num);
}

static void look(const struct arena *now)
{
	static struct arena copy;
	struct arena *a = &copy;
	struct rig *r = &a->rig;
	struct virtqueue vq;
	struct vhost_chain c;
	uint16_t ids[NUM_MAX];
	uint64_t last = 0;
	uint32_t n = 0;
	bool seen[NUM_MAX] = { 0 };

	memcpy(a, now, sizeof(*a));
	a->is_successor = true;
	point(r, a);
	/* The driver goes on while nobody is there. */
	if (rnd(2)) {
		driver_reap(a);
		for (unsigned i = rnd(3); i; i--)
			driver_add(a, rnd);
	}
	CHECK_EQ(device_init(a, &vq), 0);
	driver_reap(a);
	vhost_chain_init(&c);
	while (n <= r->o.num) {
		int rc = virtqueue_pop(&vq, &c);

		if (rc < 0)
			fprintf(stderr, "%s\n", virtqueue_fault_text(vq.report.fault));
		CHECK(rc >= 0);
		if (!rc)
			break;
		CHECK(!seen[c.id]);
		seen[c.id] = true;
		CHECK_EQ(c.ndesc, r->slots[c.id]);
		CHECK_EQ((uint8_t *)c.iov[0].iov_base - r->host[0], a->addr[c.id] - region_addr[0]);
		/* Those that are known to be popped in their order, then all others. */
		if (a->popped[c.id]) {
			CHECK(a->popped[c.id] > last);
			last = a->popped[c.id];
		} else {
			last = UINT64_MAX - 1;
		}
		ids[n++] = c.id;
	}
	CHECK_EQ(n, out(a));
	complete(a, &vq, ids, n);
	/* And it goes on. */
	driver_add(a, rnd);
	while (virtqueue_pop(&vq, &c) > 0)
		CHECK_EQ(virtqueue_push(&vq, c.id, 0), 0);
	driver_reap(a);
	CHECK_EQ(out(a), 0);
	vhost_chain_destroy(&c);
	virtqueue_destroy(&vq);
}

/* ---------------------------------------------------------- the device, in a child */

static void begin(void)
{
	arena->in_device = true;
	raise(SIGUSR1); /* the parent steps from here */
}

static void end(void)
{
	arena->in_device = false;
}

static uint32_t child_rnd(uint32_t below)
{
	return rnd(below);
}

static __attribute__((noreturn)) void device(void)
{
	struct arena *a = arena;
	struct virtqueue vq;
	struct vhost_chain c;
	uint16_t have[NUM_MAX], newest[NUM_MAX];
	uint32_t n = 0, pile = 0; /* chains to complete; of these, those that unpop may give back */

	if (ptrace(PTRACE_TRACEME, 0, 0, 0)) {
		perror("a child that wants to be stepped through: ptrace");
		_exit(1);
	}
	raise(SIGSTOP);
	vhost_chain_init(&c);
	begin();
	CHECK_EQ(device_init(a, &vq), 0);
	end();
	for (;;) {
		if (rnd(2))
			driver_add(a, child_rnd);
		if (!rnd(3))
			driver_reap(a);
		switch (rnd(6)) {
		case 0:
		case 1:
		case 2:
			begin();
			if (virtqueue_pop(&vq, &c) > 0) {
				if (!a->popped[c.id])
					a->popped[c.id] = ++a->pops;
				have[n++] = c.id;
				newest[pile++] = c.id;
			}
			CHECK_EQ(vq.report.fault, 0);
			end();
			break;
		case 3:
			if (!pile || rnd(3))
				break;
			c.id = newest[pile - 1];
			begin();
			CHECK_EQ(virtqueue_unpop(&vq, &c), 0);
			end();
			pile--;
			for (uint32_t i = 0; i < n; i++)
				if (have[i] == c.id)
					have[i] = have[--n];
			break;
		case 4:
			begin();
			for (uint32_t i = rnd(4); n && i; i--) {
				uint32_t at = rnd(n);

				CHECK_EQ(virtqueue_fill(&vq, have[at], 0), 0);
				have[at] = have[--n];
				pile = 0;
			}
			end();
			break;
		case 5:
			begin();
			virtqueue_flush(&vq);
			end();
			break;
		}
	}
}

static pid_t child_start(void)
{
	int status;
	pid_t pid = fork();

	if (!pid)
		device();
	CHECK(pid > 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
	rnd(2); /* so that the next one takes other turns */
	arena->in_device = false;
	return pid;
}

static void child_kill(pid_t pid)
{
	CHECK_EQ(kill(pid, SIGKILL), 0);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	arena->deaths++;
}

static void kill_everywhere(struct options o, uint32_t desc_num)
{
	static uint8_t last[sizeof(arena->shared)];
	uint64_t instants = 0;
	pid_t pid;

	arena_init(o, desc_num);
	pid = child_start();
	memcpy(last, &arena->shared, sizeof(last));
	while (instants < INSTANTS) {
		int status;

		CHECK_EQ(ptrace(arena->in_device ? PTRACE_SINGLESTEP : PTRACE_CONT, pid, 0, 0), 0);
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSTOPPED(status)); /* else a check of the child's failed */
		CHECK(WSTOPSIG(status) == SIGTRAP || WSTOPSIG(status) == SIGUSR1);
		if (!memcmp(last, &arena->shared, sizeof(last)))
			continue;
		memcpy(last, &arena->shared, sizeof(last));
		if (!arena->in_device)
			continue; /* in the driver, which is not what we kill */
		look(arena);
		if (++instants, !rnd(KILL_EVERY)) {
			child_kill(pid);
			pid = child_start();
		}
	}
	child_kill(pid);
	CHECK(arena->deaths > INSTANTS / KILL_EVERY / 3);
	CHECK(arena->serial > INSTANTS / 50);
	arena_end();
}

static void test_every_instant(void)
{
	static const struct {
		const char *name;
		struct options o;
		uint32_t desc_num;
	} kinds[] = {
		{ "split", { .num = 8, .start = 65530 }, 8 },
		{ "split, spare entries, in order", { .num = 8, .in_order = true }, 16 },
		{ "split, of the other byte order", { .num = 8, .swapped = true, .start = 65530 }, 8 },
		{ "split, indirect", { .num = 16, .indirect = true }, 16 },
		{ "packed", { .packed = true, .num = 7, .start = 3 }, 7 },
		{ "packed, spare entries", { .packed = true, .num = 8 }, 11 },
		{ "packed, in order", { .packed = true, .num = 9, .in_order = true }, 9 },
		{ "packed, indirect", { .packed = true, .num = 12, .indirect = true }, 12 },
		{ "packed, one slot", { .packed = true, .num = 1 }, 1 },
	};
	cpu_set_t one;

	/* Parent and child take turns: on one CPU that is several times as fast. */
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
	arena = mmap(NULL, sizeof(*arena), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(arena != MAP_FAILED);
	for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		check_context = kinds[i].name;
		kill_everywhere(kinds[i].o, kinds[i].desc_num);
	}
	munmap(arena, sizeof(*arena));
}

int main(void)
{
	RUN(test_every_instant);
	return 0;
}
