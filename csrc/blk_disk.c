/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#define _GNU_SOURCE /* fallocate, preadv2, pwritev2 */
#include "blk_disk.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

enum blk_pace blk_disk_pace(int fd)
{
	struct statfs fs;
	struct stat st;
	int flags = fcntl(fd, F_GETFL);

	if (fd < 0)
		return BLK_MEMORY;
	if (flags < 0 || flags & O_DIRECT || fstat(fd, &st) || fstatfs(fd, &fs))
		return BLK_WAITS;
	/* The file system of a block device is that of its node, which is tmpfs on most machines. */
	if (!S_ISREG(st.st_mode))
		return BLK_CACHED;
	return fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC ? BLK_MEMORY : BLK_CACHED;
}

/* Without flags by the plain calls, which every kernel has, and which cost less for one piece. */
static ssize_t move_once(int fd, bool write, const struct blk_span *s, uint64_t at, int flags)
{
	int num = s->num < IOV_MAX ? s->num : IOV_MAX;

	if (flags)
		return write ? pwritev2(fd, s->iov, num, at, flags) :
			       preadv2(fd, s->iov, num, at, flags);
	if (num == 1)
		return write ? pwrite(fd, s->iov->iov_base, s->iov->iov_len, at) :
			       pread(fd, s->iov->iov_base, s->iov->iov_len, at);
	return write ? pwritev(fd, s->iov, num, at) : preadv(fd, s->iov, num, at);
}

static int move(const struct blk_disk *disk, bool write, struct blk_span *s, uint64_t *at, int flags)
{
	ssize_t n;

	/* Memory is as stable as what is on tmpfs can be. */
	if (disk->map && likely(blk_map_move(disk->map, write, s, *at))) {
		*at += s->len;
		s->len = 0;
	}
	while (s->len) {
		n = move_once(disk->fd, write, s, *at, flags);
		if (unlikely(n <= 0)) {
			if (n < 0 && errno == EINTR)
				continue;
			/* 0: the file ends below the capacity that we announced. */
			return n < 0 ? -errno : -EIO;
		}
		if (disk->map && write)
			blk_map_filled(disk->map, *at, n);
		*at += n;
		if (likely((size_t)n == s->len)) {
			s->len = 0;
			break;
		}
		span_skip(s, n);
	}
	return 0;
}

int blk_disk_move(const struct blk_disk *disk, bool write, struct blk_span *s, uint64_t *at,
		  bool stable)
{
	return move(disk, write, s, at, write && stable ? RWF_DSYNC : 0);
}

int blk_disk_move_now(const struct blk_disk *disk, bool write, struct blk_span *s, uint64_t *at)
{
	int rc;

	if (disk->pace == BLK_MEMORY)
		return move(disk, write, s, at, 0);
	rc = move(disk, write, s, at, RWF_NOWAIT);
	/* How most file systems refuse to write so. One that means it says it again without the flag. */
	return rc == -EINVAL ? -EOPNOTSUPP : rc;
}

static int range_ioctl(int fd, unsigned long request, uint64_t offset, uint64_t len)
{
	uint64_t range[2] = { offset, len };

	return ioctl(fd, request, range) ? -errno : 0;
}

static int range_fallocate(int fd, int mode, uint64_t offset, uint64_t len)
{
	int rc;

	do
		rc = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, len);
	while (rc && errno == EINTR);
	return rc ? -errno : 0;
}

/* For files that can neither punch holes nor zero a range by themselves. */
static int range_write_zeroes(int fd, uint64_t offset, uint64_t len)
{
	static const char zeroes[65536];
	struct iovec iov[16];
	unsigned i;
	uint64_t left;
	ssize_t n;

	while (len) {
		for (i = 0, left = len; i < 16 && left; i++) {
			iov[i].iov_base = (void *)zeroes;
			iov[i].iov_len = left < sizeof(zeroes) ? left : sizeof(zeroes);
			left -= iov[i].iov_len;
		}
		n = pwritev(fd, iov, i, offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		offset += n;
		len -= n;
	}
	return 0;
}

int blk_disk_discard(const struct blk_disk *disk, uint64_t offset, uint64_t len)
{
	if (disk->block_device)
		return range_ioctl(disk->fd, BLKDISCARD, offset, len);
	if (disk->map)
		blk_map_emptied(disk->map, offset, len);
	return range_fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
}

int blk_disk_zero(const struct blk_disk *disk, uint64_t offset, uint64_t len, bool unmap)
{
	int rc = -EOPNOTSUPP;

	if (disk->block_device)
		return range_ioctl(disk->fd, BLKZEROOUT, offset, len);
	if (unmap && disk->map)
		blk_map_emptied(disk->map, offset, len);
	if (unmap)
		rc = range_fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
	if (rc == -EOPNOTSUPP)
		rc = range_fallocate(disk->fd, FALLOC_FL_ZERO_RANGE, offset, len);
	if (rc == -EOPNOTSUPP)
		rc = range_write_zeroes(disk->fd, offset, len);
	return rc;
}

int blk_disk_flush(const struct blk_disk *disk)
{
	while (fdatasync(disk->fd))
		if (errno != EINTR)
			return -errno;
	return 0;
}
