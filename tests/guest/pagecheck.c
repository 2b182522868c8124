// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * Notices a page that a device wrote and that a live migration left behind.
 *
 *   pagecheck FILE SEED OFFSET PAGES READERS STOP
 *
 * Each of READERS processes has PAGES pages of memory that no CPU ever writes once they are there: only
 * the device fills them, with O_DIRECT, each time with another of VERSIONS contents that lie on the disk
 * from OFFSET on. A page must hold what was read into it last, and is looked at just before it is read
 * into again: whatever a migration in between lost, is seen. Until the file STOP exists.
 *
 * Takes READERS * VERSIONS * PAGES * 4 KiB of the disk. Ends with "OK ..." and 0, or with the first
 * difference and 1.
 */
#define _GNU_SOURCE		/* O_DIRECT, MAP_POPULATE */

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pattern.h"

#define VERSIONS 8
#define PAGE 4096ULL

static void fail(const char *what)
{
	printf("FAIL %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned char *pages_new(uint64_t pages)
{
	unsigned char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED || mlock(p, pages * PAGE))
		fail("memory");
	return p;
}

static void write_versions(int fd, uint64_t seed, uint64_t offset, uint64_t pages)
{
	unsigned char *data = pages_new(pages);

	for (uint64_t v = 0; v < VERSIONS; v++) {
		fill(data, seed, offset, pages * PAGE);
		if (pwrite(fd, data, pages * PAGE, offset) != (ssize_t)(pages * PAGE))
			fail("write");
		offset += pages * PAGE;
	}
	if (fsync(fd))
		fail("fsync");
	munmap(data, pages * PAGE);
}

static void reader(const char *path, uint64_t seed, uint64_t offset, uint64_t pages, const char *stop)
{
	int fd = open(path, O_RDWR | O_DIRECT);
	uint8_t *version = calloc(pages, 1);
	unsigned char *memory;
	uint64_t reads = 0;

	if (fd < 0 || !version)
		fail(path);
	write_versions(fd, seed, offset, pages);
	memory = pages_new(pages);
	if (pread(fd, memory, pages * PAGE, offset) != (ssize_t)(pages * PAGE))
		fail("read");
	while (access(stop, F_OK)) {
		uint64_t i = random_below(pages);
		unsigned char *page = memory + i * PAGE;

		check(page, seed, offset + (version[i] * pages + i) * PAGE, PAGE);
		version[i] = (version[i] + 1 + random_below(VERSIONS - 1)) % VERSIONS;
		if (pread(fd, page, PAGE, offset + (version[i] * pages + i) * PAGE) != (ssize_t)PAGE)
			fail("read");
		reads++;
	}
	for (uint64_t i = 0; i < pages; i++)
		check(memory + i * PAGE, seed, offset + (version[i] * pages + i) * PAGE, PAGE);
	printf("OK %llu reads\n", (unsigned long long)reads);
}

int main(int argc, char **argv)
{
	uint64_t seed, offset, pages;
	int failed = 0, status;

	if (argc < 7) {
		fprintf(stderr, "usage: see the head of pagecheck.c\n");
		return 2;
	}
	seed = strtoull(argv[2], NULL, 0);
	offset = strtoull(argv[3], NULL, 0);
	pages = strtoull(argv[4], NULL, 0);
	setvbuf(stdout, NULL, _IOFBF, BUFSIZ);
	for (int i = 0; i < atoi(argv[5]); i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (pid == 0) {
			random_state = mix(seed + i);
			reader(argv[1], seed, offset + i * VERSIONS * pages * PAGE, pages, argv[6]);
			exit(0);
		}
	}
	while (wait(&status) > 0)
		failed |= status;
	return failed ? 1 : 0;
}
