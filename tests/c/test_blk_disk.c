/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a disk is served from: how fast which kind of file answers, and a file on tmpfs as memory of ours, of
 * which holes stay holes, and which others truncate at any moment.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk_disk.h"
#include "check.h"
#include "sigbus.h"

#define PAGE 4096u
#define PAGES 40u /* two chunks and a half */
#define SIZE (PAGES * PAGE)

static uint8_t byte_at(uint64_t at)
{
	return (uint8_t)(at * 31 + at / 4099);
}

static void fill(int fd, uint64_t from, uint64_t to)
{
	uint8_t block[PAGE];
	uint64_t at;
	unsigned i;

	for (at = from; at < to; at += i) {
		for (i = 0; i < PAGE && at + i < to; i++)
			block[i] = byte_at(at + i);
		CHECK_EQ(pwrite(fd, block, i, at), i);
	}
}

struct rig {
	int fd, handle;
	struct blk_disk disk;
};

static void rig_init(struct rig *r, uint64_t size)
{
	memset(r, 0, sizeof(*r));
	r->fd = memfd_create("disk", MFD_CLOEXEC);
	CHECK(r->fd >= 0);
	CHECK_EQ(ftruncate(r->fd, size), 0);
	r->disk.fd = r->fd;
	r->disk.pace = blk_disk_pace(r->fd);
	CHECK_EQ(r->disk.pace, BLK_MEMORY);
}

static void rig_map(struct rig *r)
{
	r->disk.map = blk_map_new(r->fd, false);
	CHECK(r->disk.map);
	r->handle = sigbus_register(r->disk.map->base, r->disk.map->size, &r->disk.map->broken);
	CHECK(r->handle >= 0);
}

static void rig_destroy(struct rig *r)
{
	sigbus_unregister(r->handle);
	blk_map_free(r->disk.map);
	close(r->fd);
}

static uint64_t blocks(const struct rig *r)
{
	struct stat st;

	CHECK_EQ(fstat(r->fd, &st), 0);
	return st.st_blocks;
}

/* By the map alone. */
static bool map_move(struct rig *r, bool write, void *data, uint32_t len, uint64_t at)
{
	struct iovec iov[2] = { { data, len / 3 }, { (char *)data + len / 3, len - len / 3 } };
	struct blk_span s = { iov, 2, len, 0 };

	return blk_map_move(r->disk.map, write, &s, at);
}

static int disk_move(struct rig *r, bool write, void *data, uint32_t len, uint64_t at)
{
	struct iovec iov = { data, len };
	struct blk_span s = { &iov, 1, len, 0 };
	uint64_t end = at;
	int rc = blk_disk_move_now(&r->disk, write, &s, &end);

	CHECK_EQ(end, at + len - s.len);
	return rc;
}

static void test_pace(void)
{
	static const char *const nodes[] = { "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0", "/dev/zram0" };
	unsigned i;
	int fd;

	CHECK_EQ(blk_disk_pace(-1), BLK_MEMORY);
	/* Its node is on tmpfs, and it is not. */
	for (i = 0; i < sizeof(nodes) / sizeof(nodes[0]); i++) {
		fd = open(nodes[i], O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		check_context = nodes[i];
		CHECK_EQ(blk_disk_pace(fd), BLK_CACHED);
		close(fd);
	}
	check_context = "";
}

static void test_nothing_to_map(void)
{
	int fd = memfd_create("empty", MFD_CLOEXEC | MFD_ALLOW_SEALING), pipes[2];

	CHECK(!blk_map_new(fd, false));
	CHECK_EQ(ftruncate(fd, SIZE), 0);
	CHECK_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0);
	CHECK(!blk_map_new(fd, false));
	close(fd);
	CHECK(!blk_map_new(fd, false));
	CHECK_EQ(pipe(pipes), 0);
	CHECK(!blk_map_new(pipes[0], true));
	close(pipes[0]);
	close(pipes[1]);
}

static void test_moves(void)
{
	static uint8_t data[SIZE], file[SIZE];
	uint32_t seed = 1, len, i;
	struct rig r;
	uint64_t at;

	rig_init(&r, SIZE - 100);
	fill(r.fd, 0, SIZE - 100);
	rig_map(&r);
	for (i = 0; i < 500; i++) {
		seed = seed * 1664525u + 1013904223u;
		at = (seed >> 8) % (SIZE - 100);
		seed = seed * 1664525u + 1013904223u;
		len = 1 + (seed >> 8) % (SIZE - 100 - at);
		CHECK_EQ(pread(r.fd, file, len, at), len);
		memset(data, i, len);
		if (i % 2) {
			CHECK(map_move(&r, true, data, len, at));
			CHECK_EQ(pread(r.fd, file, len, at), len);
		} else {
			CHECK(map_move(&r, false, data, len, at));
		}
		CHECK(!memcmp(data, file, len));
	}
	CHECK_EQ(disk_move(&r, false, data, 0, 0), 0);
	/* Beyond what was mapped, if only by a byte. */
	CHECK(map_move(&r, false, data, 512, SIZE - 612));
	CHECK(!map_move(&r, false, data, 513, SIZE - 612));
	CHECK(!map_move(&r, false, data, 1, SIZE - 100));
	CHECK(!map_move(&r, false, data, 512, UINT64_MAX - 100));
	/* It has grown since: there, too, by a system call. */
	CHECK_EQ(ftruncate(r.fd, SIZE), 0);
	fill(r.fd, SIZE - 100, SIZE);
	CHECK_EQ(disk_move(&r, false, data, 512, SIZE - 512), 0);
	CHECK_EQ(data[511], byte_at(SIZE - 1));
	rig_destroy(&r);
}

/* What is read of a hole does not fill it, by whatever way it became one. */
static void test_holes_stay(void)
{
	uint8_t data[3 * PAGE];
	uint64_t before;
	struct rig r;

	rig_init(&r, SIZE);
	fill(r.fd, 3 * PAGE, 5 * PAGE);
	rig_map(&r);
	before = blocks(&r);
	CHECK(!map_move(&r, false, data, 2 * PAGE, 2 * PAGE));
	CHECK(!map_move(&r, true, data, 2 * PAGE, 4 * PAGE));
	CHECK(!map_move(&r, false, data, 512, 30 * PAGE));
	CHECK(map_move(&r, false, data, 2 * PAGE, 3 * PAGE));
	CHECK_EQ(data[PAGE + 7], byte_at(4 * PAGE + 7));
	CHECK_EQ(disk_move(&r, false, data, 3 * PAGE, 2 * PAGE), 0);
	CHECK_EQ(data[0], 0);
	CHECK_EQ(data[PAGE], byte_at(3 * PAGE));
	CHECK_EQ(blocks(&r), before);

	/* A write by a system call has filled them, over the border of a chunk. */
	memset(data, 7, sizeof(data));
	CHECK_EQ(disk_move(&r, true, data, 2 * PAGE, 15 * PAGE), 0);
	CHECK(blocks(&r) > before);
	CHECK(map_move(&r, false, data + PAGE, 2 * PAGE, 15 * PAGE));
	CHECK(!map_move(&r, false, data, 512, 14 * PAGE));
	CHECK(!map_move(&r, false, data, 512, 17 * PAGE));

	CHECK_EQ(blk_disk_discard(&r.disk, 15 * PAGE, 2 * PAGE), 0);
	CHECK_EQ(blk_disk_zero(&r.disk, 3 * PAGE, PAGE, true), 0);
	before = blocks(&r);
	CHECK(!map_move(&r, false, data, 2 * PAGE, 15 * PAGE));
	CHECK(!map_move(&r, false, data, 512, 3 * PAGE));
	CHECK(map_move(&r, false, data, PAGE, 4 * PAGE));
	CHECK_EQ(disk_move(&r, false, data, 2 * PAGE, 15 * PAGE), 0);
	CHECK_EQ(data[PAGE], 0);
	CHECK_EQ(blocks(&r), before);
	rig_destroy(&r);
}

/* From the moment on at which the file is shorter, requests find out what system calls say. */
static void test_truncated(void)
{
	uint8_t data[4 * PAGE];
	struct rig r;

	rig_init(&r, SIZE);
	fill(r.fd, 0, SIZE);
	rig_map(&r);
	CHECK(map_move(&r, false, data, 4 * PAGE, 8 * PAGE));
	CHECK_EQ(ftruncate(r.fd, 10 * PAGE), 0);
	CHECK(map_move(&r, false, data, 2 * PAGE, 8 * PAGE)); /* what is there is there */
	CHECK_EQ(disk_move(&r, false, data, 4 * PAGE, 8 * PAGE), -EIO);
	CHECK(blk_map_broken(r.disk.map));
	CHECK(!map_move(&r, false, data, 512, 0));
	/* A write that met zero pages of ours is done again where it belongs, for others to see. */
	memset(data, 9, sizeof(data));
	CHECK_EQ(disk_move(&r, true, data, 4 * PAGE, 20 * PAGE), 0);
	memset(data, 0, sizeof(data));
	CHECK_EQ(pread(r.fd, data, PAGE, 23 * PAGE), PAGE);
	CHECK_EQ(data[PAGE - 1], 9);
	rig_destroy(&r);
}

static void test_truncated_by_a_write(void)
{
	uint8_t data[4 * PAGE];
	struct rig r;

	rig_init(&r, SIZE);
	fill(r.fd, 0, SIZE);
	rig_map(&r);
	CHECK(map_move(&r, false, data, 512, 20 * PAGE));
	CHECK_EQ(ftruncate(r.fd, 10 * PAGE), 0);
	memset(data, 9, sizeof(data));
	CHECK_EQ(disk_move(&r, true, data, 4 * PAGE, 20 * PAGE), 0);
	CHECK(blk_map_broken(r.disk.map));
	memset(data, 0, sizeof(data));
	CHECK_EQ(pread(r.fd, data, 4 * PAGE, 20 * PAGE), 4 * PAGE);
	CHECK_EQ(data[0], 9);
	CHECK_EQ(data[4 * PAGE - 1], 9);
	rig_destroy(&r);
}

/* ------------------------------------------------------------------ at any moment */

struct user {
	struct rig *r;
	uint64_t at; /* a page of his own, below where it is truncated; and one behind that */
	pthread_t thread;
};

static bool stop;

static void *use(void *arg)
{
	struct user *u = arg;
	uint8_t data[PAGE], back[PAGE];
	unsigned i;

	for (i = 0; !READ_ONCE(stop); i++) {
		memset(data, i, sizeof(data));
		CHECK_EQ(disk_move(u->r, true, data, PAGE, u->at), 0);
		CHECK_EQ(disk_move(u->r, false, back, PAGE, u->at), 0);
		CHECK(!memcmp(data, back, PAGE));
		CHECK_EQ(pread(u->r->fd, back, PAGE, u->at), PAGE);
		CHECK(!memcmp(data, back, PAGE));
		/* What somebody else takes away: written, or, read, what was there, nothing or an error. */
		memset(data, 5, sizeof(data));
		CHECK_EQ(disk_move(u->r, true, data, PAGE, u->at + SIZE / 2), 0);
		if (!disk_move(u->r, false, back, PAGE, u->at + SIZE / 2))
			CHECK(back[0] == 5 || back[0] == 0);
	}
	return NULL;
}

static void test_truncated_in_use(void)
{
	struct user users[3];
	unsigned i, round;
	struct rig r;

	for (round = 0; round < 30; round++) {
		rig_init(&r, SIZE);
		fill(r.fd, 0, SIZE);
		rig_map(&r);
		WRITE_ONCE(stop, false);
		for (i = 0; i < 3; i++) {
			users[i] = (struct user){ .r = &r, .at = i * 5 * PAGE };
			CHECK_EQ(pthread_create(&users[i].thread, NULL, use, &users[i]), 0);
		}
		for (i = 0; i < 20; i++) {
			CHECK_EQ(ftruncate(r.fd, SIZE / 2), 0);
			CHECK_EQ(ftruncate(r.fd, SIZE), 0);
			usleep(50);
		}
		WRITE_ONCE(stop, true);
		for (i = 0; i < 3; i++)
			CHECK_EQ(pthread_join(users[i].thread, NULL), 0);
		rig_destroy(&r);
	}
}

int main(void)
{
	CHECK_EQ(sigbus_install(), 0);
	RUN(test_pace);
	RUN(test_nothing_to_map);
	RUN(test_moves);
	RUN(test_holes_stay);
	RUN(test_truncated);
	RUN(test_truncated_by_a_write);
	RUN(test_truncated_in_use);
	return 0;
}
