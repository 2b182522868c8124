// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Many connections to one vhost-user-blk back-end through libblkio, of which some are busy: 4 KiB random
 * reads, each checked, from one thread that polls.
 *
 *     scale_client PATH CONNECTIONS BUSY DEPTH BLOCKS CHECK
 *
 * Says "ready" when all are connected and each has read once. Then for each line of standard input, a
 * number of milliseconds, it reads for so long and answers with how many reads that were. CHECK is 1 if
 * the first word of a block is its number (a null device leaves buffers alone).
 */
#include <blkio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK 4096u
#define MAX_DEPTH 128u

struct connection {
	struct blkio *b;
	struct blkioq *q;
	struct blkio_mem_region region;
	uint64_t asked[MAX_DEPTH]; /* the block that each buffer waits for */
};

static uint32_t depth, blocks, seed = 1;
static int check;

static _Noreturn void die(const char *what, int rc)
{
	fprintf(stderr, "%s: %s: %s\n", what, strerror(rc < 0 ? -rc : rc), blkio_get_error_msg());
	exit(1);
}

static void must(const char *what, int rc)
{
	if (rc < 0)
		die(what, rc);
}

static void connect_to(struct connection *c, const char *path)
{
	must("create", blkio_create("virtio-blk-vhost-user", &c->b));
	must("path", blkio_set_str(c->b, "path", path));
	must("connect", blkio_connect(c->b));
	must("queues", blkio_set_int(c->b, "num-queues", 1));
	must("start", blkio_start(c->b));
	must("alloc", blkio_alloc_mem_region(c->b, &c->region, (size_t)MAX_DEPTH * BLOCK));
	must("map", blkio_map_mem_region(c->b, &c->region));
	c->q = blkio_get_queue(c->b, 0);
}

static void ask(struct connection *c, uint64_t slot)
{
	uint64_t *word = (uint64_t *)((char *)c->region.addr + slot * BLOCK);

	seed = seed * 1664525u + 1013904223u;
	c->asked[slot] = (seed >> 4) % blocks;
	*word = UINT64_MAX;
	blkioq_read(c->q, c->asked[slot] * BLOCK, word, BLOCK, (void *)slot, 0);
}

/* Takes what is done, and asks again if `more`. */
static uint32_t reap(struct connection *c, uint32_t least, int more)
{
	struct blkio_completion done[MAX_DEPTH];
	int n = blkioq_do_io(c->q, done, (int)least, (int)MAX_DEPTH, NULL);

	must("do_io", n);
	for (int i = 0; i < n; i++) {
		uint64_t slot = (uint64_t)done[i].user_data;
		uint64_t word = *(uint64_t *)((char *)c->region.addr + slot * BLOCK);

		if (done[i].ret)
			die("read", done[i].ret);
		if (check && word != c->asked[slot])
			die("wrong data", 0);
		if (more)
			ask(c, slot);
	}
	return (uint32_t)n;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t work(struct connection *connections, uint32_t busy, uint64_t ms)
{
	uint64_t count = 0, end = now() + ms * 1000000u;

	for (uint32_t i = 0; i < busy; i++)
		for (uint32_t slot = 0; slot < depth; slot++)
			ask(&connections[i], slot);
	while (now() < end)
		for (uint32_t i = 0; i < busy; i++)
			count += reap(&connections[i], 0, 1);
	for (uint32_t i = 0; i < busy; i++)
		for (uint32_t left = depth; left;) {
			uint32_t n = reap(&connections[i], 1, 0);

			left -= n;
			count += n;
		}
	return count;
}

int main(int argc, char **argv)
{
	uint32_t n, busy;
	struct connection *connections;
	uint64_t ms;

	if (argc != 7)
		return 2;
	n = (uint32_t)atoi(argv[2]);
	busy = (uint32_t)atoi(argv[3]);
	depth = (uint32_t)atoi(argv[4]);
	blocks = (uint32_t)atoi(argv[5]);
	check = atoi(argv[6]);
	if (busy > n || depth > MAX_DEPTH || !(connections = calloc(n, sizeof(*connections))))
		return 2;
	for (uint32_t i = 0; i < n; i++) {
		connect_to(&connections[i], argv[1]);
		ask(&connections[i], 0);
		reap(&connections[i], 1, 0);
	}
	puts("ready");
	fflush(stdout);
	while (scanf("%lu", &ms) == 1) {
		printf("%lu\n", work(connections, busy, ms));
		fflush(stdout);
	}
	for (uint32_t i = 0; i < n; i++)
		blkio_destroy(&connections[i].b);
	return 0;
}
