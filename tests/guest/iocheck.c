// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Verified I/O on a block device or a plain file; runs in the guest and, to look at the same
 * data from the other side, on the host.
 *
 *   iocheck write   FILE SEED OFFSET LENGTH   pieces of 512 B to 1 MiB in random order, fsync,
 *                                             then everything read back in other pieces
 *   iocheck verify  FILE SEED OFFSET LENGTH   only the second half
 *   iocheck zero    FILE OFFSET LENGTH        all of it reads as zeroes
 *   iocheck discard|zeroout FILE OFFSET LENGTH   the BLKDISCARD and BLKZEROOUT ioctls
 *   iocheck churn   FILE SEED OFFSET LENGTH WRITERS STOP   so many processes, each in a slice of its
 *                                             own, write and verify until the file STOP exists
 *
 * churn says how many pages of its buffers lie above 4 GiB, where memory that is plugged in comes to be.
 * Ends with "OK ..." and 0, or with the first difference and 1.
 */
#define _GNU_SOURCE		/* O_DIRECT */

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pattern.h"

#define EXPONENTS 12		/* pieces of 512 << 0 to 512 << 11 bytes */
#define PIECE_MAX (SECTOR << (EXPONENTS - 1))
#define BLOCK 4096ULL		/* what churn counts generations of */

static void fail(const char *what, uint64_t at)
{
	printf("FAIL %s at byte %llu: %s\n", what, (unsigned long long)at, strerror(errno));
	exit(1);
}

/* O_DIRECT, so that each read and write is a request of the device; tmpfs on a host may refuse. */
static int open_file(const char *path, int flags)
{
	int fd = open(path, flags | O_DIRECT);

	if (fd < 0 && errno == EINVAL)
		fd = open(path, flags);
	if (fd < 0)
		fail(path, 0);
	return fd;
}

/* Of the pages that are there; the kernel tells root alone where. */
static unsigned int pages_above_4g(const unsigned char *p, uint64_t length)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	unsigned int above = 0;
	uint64_t entry;

	for (uint64_t at = (uintptr_t)p; at < (uintptr_t)p + length; at += BLOCK)
		if (pread(fd, &entry, sizeof(entry), at / BLOCK * sizeof(entry)) == sizeof(entry) &&
		    entry >> 63 && (entry & ((1ULL << 55) - 1)) >= (1ULL << 32) / BLOCK)
			above++;
	close(fd);
	return above;
}

/* Sectors start at odd multiples of 512 in memory too: a request then has many segments. */
static unsigned char *buffer_new(void)
{
	unsigned char *p = aligned_alloc(BLOCK, PIECE_MAX + BLOCK);

	if (!p)
		fail("aligned_alloc", 0);
	return p;
}

static unsigned char *shifted(unsigned char *base)
{
	return base + random_below(BLOCK / SECTOR) * SECTOR;
}

static void write_all(int fd, const void *buffer, uint64_t length, uint64_t offset)
{
	ssize_t n = pwrite(fd, buffer, length, offset);

	if (n < 0 || (uint64_t)n != length)
		fail("write", offset);
}

static void read_all(int fd, void *buffer, uint64_t length, uint64_t offset)
{
	ssize_t n = pread(fd, buffer, length, offset);

	if (n < 0 || (uint64_t)n != length)
		fail("read", offset);
}

static void verify(int fd, uint64_t seed, uint64_t offset, uint64_t length)
{
	unsigned char *base = buffer_new();

	for (uint64_t done = 0; done < length;) {
		uint64_t n = piece_length(length - done, EXPONENTS);
		unsigned char *p = shifted(base);

		read_all(fd, p, n, offset + done);
		check(p, seed, offset + done, n);
		done += n;
	}
	free(base);
}

static void write_shuffled(int fd, uint64_t seed, uint64_t offset, uint64_t length)
{
	struct piece { uint64_t offset, length; } *piece = calloc(length / SECTOR, sizeof(*piece));
	unsigned char *base = buffer_new();
	uint64_t count = 0;

	if (!piece)
		fail("calloc", 0);
	for (uint64_t done = 0; done < length; count++) {
		piece[count].offset = offset + done;
		piece[count].length = piece_length(length - done, EXPONENTS);
		done += piece[count].length;
	}
	for (uint64_t i = count; i-- > 0;) {
		uint64_t j = random_below(i + 1);
		struct piece p = piece[j];
		unsigned char *data = shifted(base);

		piece[j] = piece[i];
		fill(data, seed, p.offset, p.length);
		write_all(fd, data, p.length, p.offset);
	}
	if (fsync(fd))
		fail("fsync", 0);
	printf("%llu requests ", (unsigned long long)count);
	free(base);
	free(piece);
}

static void verify_zero(int fd, uint64_t offset, uint64_t length)
{
	unsigned char *base = buffer_new();

	for (uint64_t done = 0; done < length;) {
		uint64_t n = piece_length(length - done, EXPONENTS);

		read_all(fd, base, n, offset + done);
		check_zero(base, offset + done, n);
		done += n;
	}
	free(base);
}

static uint64_t churn_seed(uint64_t seed, uint64_t generation)
{
	return mix(seed + generation);
}

/*
 * One writer of churn. A read must show the newest generation that was written, so that a
 * request which was lost, done twice out of order or done at the wrong place is seen at once.
 */
static void churn_slice(const char *path, uint64_t seed, uint64_t offset, uint64_t length,
			const char *stop)
{
	int fd = open_file(path, O_RDWR);
	unsigned char *base = buffer_new();
	uint64_t blocks = length / BLOCK;
	uint32_t *generation = calloc(blocks, sizeof(*generation));
	uint64_t requests = 0;

	if (!generation)
		fail("calloc", 0);
	while (access(stop, F_OK)) {
		uint64_t first = random_below(blocks);
		uint64_t n = 1 + random_below(8);

		if (n > blocks - first)
			n = blocks - first;
		if (random_below(4)) {
			for (uint64_t i = first; i < first + n; i++)
				fill(base + (i - first) * BLOCK, churn_seed(seed, ++generation[i]),
				     offset + i * BLOCK, BLOCK);
			write_all(fd, base, n * BLOCK, offset + first * BLOCK);
		} else {
			read_all(fd, base, n * BLOCK, offset + first * BLOCK);
			for (uint64_t i = first; i < first + n; i++)
				if (generation[i])
					check(base + (i - first) * BLOCK,
					      churn_seed(seed, generation[i]),
					      offset + i * BLOCK, BLOCK);
		}
		requests++;
	}
	if (fsync(fd))
		fail("fsync", offset);
	for (uint64_t i = 0; i < blocks; i++) {
		if (!generation[i])
			continue;
		read_all(fd, base, BLOCK, offset + i * BLOCK);
		check(base, churn_seed(seed, generation[i]), offset + i * BLOCK, BLOCK);
	}
	/* Leave what anybody can verify with the seed alone. */
	write_shuffled(fd, seed, offset, length);
	printf("in the end, %llu before; %u pages above 4 GiB\n", (unsigned long long)requests,
	       pages_above_4g(base, 8 * BLOCK));
}

static int churn(const char *path, uint64_t seed, uint64_t offset, uint64_t length,
		 unsigned int writers, const char *stop)
{
	uint64_t slice = length / writers / BLOCK * BLOCK;
	int failed = 0, status;

	for (unsigned int i = 0; i < writers; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork", 0);
		if (pid == 0) {
			random_state = seed ^ mix(i);
			churn_slice(path, seed, offset + i * slice, slice, stop);
			exit(0);
		}
	}
	while (wait(&status) > 0)
		failed |= status;
	return failed ? 1 : 0;
}

static void range_ioctl(const char *path, unsigned long request, const char *name,
			uint64_t offset, uint64_t length)
{
	uint64_t range[2] = { offset, length };
	int fd = open_file(path, O_RDWR);

	if (ioctl(fd, request, range) || fsync(fd))
		fail(name, offset);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	int seeded = !strcmp(mode, "write") || !strcmp(mode, "verify") || !strcmp(mode, "churn");
	uint64_t seed, offset, length;

	if (argc < 5 + seeded || (!strcmp(mode, "churn") && argc < 8)) {
		fprintf(stderr, "usage: see the head of iocheck.c\n");
		return 2;
	}
	seed = seeded ? strtoull(argv[3], NULL, 0) : 0;
	offset = strtoull(argv[3 + seeded], NULL, 0);
	length = strtoull(argv[4 + seeded], NULL, 0);
	random_state = mix(seed) ^ length;
	setvbuf(stdout, NULL, _IOFBF, BUFSIZ);

	if (!strcmp(mode, "write")) {
		int fd = open_file(argv[2], O_RDWR);

		write_shuffled(fd, seed, offset, length);
		verify(fd, seed, offset, length);
	} else if (!strcmp(mode, "verify")) {
		verify(open_file(argv[2], O_RDONLY), seed, offset, length);
	} else if (!strcmp(mode, "churn")) {
		if (churn(argv[2], seed, offset, length, atoi(argv[6]), argv[7]))
			return 1;
	} else if (!strcmp(mode, "zero")) {
		verify_zero(open_file(argv[2], O_RDONLY), offset, length);
	} else if (!strcmp(mode, "discard")) {
		range_ioctl(argv[2], BLKDISCARD, mode, offset, length);
	} else if (!strcmp(mode, "zeroout")) {
		range_ioctl(argv[2], BLKZEROOUT, mode, offset, length);
	} else {
		fprintf(stderr, "iocheck: no mode %s\n", mode);
		return 2;
	}
	printf("OK %llu\n", (unsigned long long)length);
	return 0;
}
