// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Verified I/O through libblkio, a vhost-user front-end and virtio-blk driver that this project
 * did not write.
 *
 *   blkio_verify SOCKET QUEUE_SIZE QUEUES DEPTH poll|event SEED BYTES
 *
 * On each queue in turn, DEPTH requests in flight: pieces of 512 B to 64 KiB, a third of them
 * vectored, in random order: written, flushed, read back and compared. Then one piece is discarded
 * and one zeroed. Ends with "OK ..." and 0, or with what differs and 1.
 */
#include <blkio.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

#define EXPONENTS 8
#define SLOT (SECTOR << (EXPONENTS - 1))
#define TIMEOUT_MS 20000

struct request {
	uint64_t offset, length;
	unsigned char *data;
	struct iovec iov[3];
};

static void fail(const char *what, int error)
{
	printf("FAIL %s: %s (%s)\n", what, strerror(-error), blkio_get_error_msg());
	exit(1);
}

static void must(const char *what, int result)
{
	if (result < 0)
		fail(what, result);
}

/* At least one completion, either by looking again and again or by the completion eventfd. */
static int reap(struct blkioq *q, struct blkio_completion *done, int max, bool polling)
{
	struct pollfd fd = { .fd = blkioq_get_completion_fd(q), .events = POLLIN };
	time_t give_up = time(NULL) + TIMEOUT_MS / 1000;
	uint64_t count;

	for (;;) {
		int n = blkioq_do_io(q, done, 0, max, NULL);

		must("do_io", n);
		for (int i = 0; i < n; i++)
			if (done[i].ret)
				fail("completion", done[i].ret);
		if (n)
			return n;
		if (time(NULL) > give_up || (!polling && poll(&fd, 1, TIMEOUT_MS) == 0))
			fail("completions", -ETIMEDOUT);
		if (!polling && read(fd.fd, &count, sizeof(count)) < 0)
			fail("completion eventfd", -errno);
	}
}

static void submit(struct blkioq *q, struct request *r, bool write, uint64_t seed)
{
	uint64_t first = SECTOR / 2, rest;

	if (write)
		fill(r->data, seed, r->offset, r->length);
	else
		memset(r->data, 0xa5, r->length);
	if (random_below(3)) {
		if (write)
			blkioq_write(q, r->offset, r->data, r->length, r, 0);
		else
			blkioq_read(q, r->offset, r->data, r->length, r, 0);
		return;
	}
	/* Segments need not end at sectors. */
	rest = (r->length - first) / 2;
	r->iov[0] = (struct iovec){ r->data, first };
	r->iov[1] = (struct iovec){ r->data + first, rest };
	r->iov[2] = (struct iovec){ r->data + first + rest, r->length - first - rest };
	if (write)
		blkioq_writev(q, r->offset, r->iov, 3, r, 0);
	else
		blkioq_readv(q, r->offset, r->iov, 3, r, 0);
}

struct piece {
	uint64_t offset, length;
};

static void transfer(struct blkioq *q, struct piece *piece, uint64_t pieces, unsigned char *memory,
		     int depth, bool polling, bool write, uint64_t seed)
{
	struct request *all = calloc(depth, sizeof(*all)), **spare = calloc(depth, sizeof(*spare));
	struct blkio_completion *done = calloc(depth, sizeof(*done));
	uint64_t next = 0, finished = 0;
	int free_count = 0;

	if (!all || !spare || !done)
		fail("calloc", -ENOMEM);
	for (int i = 0; i < depth; i++) {
		all[i].data = memory + i * SLOT;
		spare[free_count++] = &all[i];
	}
	while (finished < pieces) {
		int n;

		while (free_count && next < pieces) {
			struct request *r = spare[--free_count];

			r->offset = piece[next].offset;
			r->length = piece[next].length;
			submit(q, r, write, seed);
			next++;
		}
		n = reap(q, done, depth, polling);
		for (int i = 0; i < n; i++) {
			struct request *r = done[i].user_data;

			if (!write)
				check(r->data, seed, r->offset, r->length);
			spare[free_count++] = r;
		}
		finished += n;
	}
	free(done);
	free(spare);
	free(all);
}

static void shuffle(struct piece *piece, uint64_t count)
{
	for (uint64_t i = count; i > 1; i--) {
		uint64_t j = random_below(i);
		struct piece p = piece[j];

		piece[j] = piece[i - 1];
		piece[i - 1] = p;
	}
}

static void must_read_zero(struct blkioq *q, unsigned char *memory, uint64_t offset, bool polling)
{
	struct blkio_completion done;

	memset(memory, 0xa5, SLOT);
	blkioq_read(q, offset, memory, SLOT, NULL, 0);
	reap(q, &done, 1, polling);
	check_zero(memory, offset, SLOT);
}

static uint64_t exercise(struct blkioq *q, unsigned char *memory, int depth, bool polling,
			 uint64_t seed, uint64_t offset, uint64_t length)
{
	struct piece *piece = calloc(length / SECTOR, sizeof(*piece));
	struct blkio_completion done;
	uint64_t count = 0;

	if (!piece)
		fail("calloc", -ENOMEM);
	blkioq_set_completion_fd_enabled(q, !polling);
	for (uint64_t at = 0; at < length; at += piece[count++].length) {
		piece[count].offset = offset + at;
		piece[count].length = piece_length(length - at, EXPONENTS);
	}
	shuffle(piece, count);
	transfer(q, piece, count, memory, depth, polling, true, seed);
	blkioq_flush(q, NULL, 0);
	reap(q, &done, 1, polling);
	shuffle(piece, count);
	transfer(q, piece, count, memory, depth, polling, false, seed);

	blkioq_discard(q, offset, SLOT, NULL, 0);
	reap(q, &done, 1, polling);
	must_read_zero(q, memory, offset, polling);
	blkioq_write_zeroes(q, offset + SLOT, SLOT, NULL, 0);
	reap(q, &done, 1, polling);
	must_read_zero(q, memory, offset + SLOT, polling);
	/* Put back what the caller finds in the file. */
	fill(memory, seed, offset, 2 * SLOT);
	blkioq_write(q, offset, memory, 2 * SLOT, NULL, 0);
	reap(q, &done, 1, polling);
	free(piece);
	return 2 * count;
}

int main(int argc, char **argv)
{
	struct blkio_mem_region region;
	uint64_t seed, bytes, requests = 0;
	int queues, depth;
	struct blkio *b;
	bool polling;

	if (argc != 8) {
		fprintf(stderr, "usage: see the head of blkio_verify.c\n");
		return 2;
	}
	queues = atoi(argv[3]);
	depth = atoi(argv[4]);
	polling = !strcmp(argv[5], "poll");
	seed = strtoull(argv[6], NULL, 0);
	bytes = strtoull(argv[7], NULL, 0) / queues / SECTOR * SECTOR;
	random_state = mix(seed);

	must("create", blkio_create("virtio-blk-vhost-user", &b));
	must("path", blkio_set_str(b, "path", argv[1]));
	must("connect", blkio_connect(b));
	must("queue-size", blkio_set_int(b, "queue-size", atoi(argv[2])));
	must("num-queues", blkio_set_int(b, "num-queues", queues));
	must("start", blkio_start(b));
	must("memory", blkio_alloc_mem_region(b, &region, (depth > 1 ? depth : 2) * SLOT));
	must("map", blkio_map_mem_region(b, &region));
	for (int i = 0; i < queues; i++)
		requests += exercise(blkio_get_queue(b, i), region.addr, depth, polling, seed,
				     i * bytes, bytes);
	blkio_unmap_mem_region(b, &region);
	blkio_free_mem_region(b, &region);
	blkio_destroy(&b);
	printf("OK %llu requests, %llu bytes\n", (unsigned long long)requests,
	       (unsigned long long)bytes * queues);
	return 0;
}
