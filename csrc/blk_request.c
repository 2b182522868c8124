/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Requests are parsed in place: the chain's iovecs are private copies, so the header is cut off
 * their front and the status byte off their end, and what is left goes to the kernel as it is,
 * whatever the layout (VIRTIO_F_ANY_LAYOUT, 2.7.4). Guest memory is read once: the header and the
 * ranges into locals, the data by the kernel.
 */
#define _GNU_SOURCE /* fallocate, pwritev2 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "barrier.h"
#include "blk_request.h"

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

/* Some bytes of a chain: what is left of its readable or its writable iovecs. */
struct span {
	struct iovec *iov;
	uint32_t num;
	uint32_t len;
	size_t cut; /* bytes that the first of them lost */
};

/* The first iovec as it was popped. */
static inline void span_mend(struct span *s)
{
	s->iov->iov_base = (char *)s->iov->iov_base - s->cut;
	s->iov->iov_len += s->cut;
	s->cut = 0;
}

static void span_skip(struct span *s, size_t n)
{
	s->len -= n;
	while (n && n >= s->iov->iov_len) {
		n -= s->iov->iov_len;
		if (unlikely(s->cut))
			span_mend(s);
		s->iov++;
		s->num--;
	}
	if (n) {
		s->iov->iov_base = (char *)s->iov->iov_base + n;
		s->iov->iov_len -= n;
		s->cut += n;
	}
}

/* The next n bytes, which must be there, into private memory; read exactly once. */
static void span_take(struct span *s, void *to, size_t n)
{
	char *out = to;
	size_t piece;

	while (n) {
		piece = s->iov->iov_len < n ? s->iov->iov_len : n;
		memcpy(out, s->iov->iov_base, piece);
		span_skip(s, piece);
		out += piece;
		n -= piece;
	}
	/* Without this the compiler may load a field from guest memory again, after its check. */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static void span_put(struct span *s, const void *from, size_t n)
{
	const char *in = from;
	size_t piece;

	while (n) {
		piece = s->iov->iov_len < n ? s->iov->iov_len : n;
		memcpy(s->iov->iov_base, in, piece);
		span_skip(s, piece);
		in += piece;
		n -= piece;
	}
}

static uint8_t *span_cut_last_byte(struct span *s)
{
	struct iovec *last = &s->iov[s->num - 1];

	s->len--;
	if (!--last->iov_len)
		s->num--;
	return (uint8_t *)last->iov_base + last->iov_len;
}

/* What was cut off is there again. `last`: where the last byte was. */
static inline void span_restore(struct span *s, struct iovec *last)
{
	if (unlikely(s->cut))
		span_mend(s);
	last->iov_len++;
}

static inline bool in_disk(uint64_t capacity, uint64_t sector, uint64_t count)
{
	return sector <= capacity && count <= capacity - sector;
}

/* All of the span at the offset, or a negative errno; what did move is gone from the span. */
static int span_io(const struct blk_disk *disk, bool write, struct span *s, uint64_t offset,
		   bool stable)
{
	int num;
	ssize_t n;

	while (s->len) {
		num = s->num < IOV_MAX ? s->num : IOV_MAX;
		if (write && stable)
			n = pwritev2(disk->fd, s->iov, num, offset, RWF_DSYNC);
		else if (num == 1)
			n = write ? pwrite(disk->fd, s->iov->iov_base, s->iov->iov_len, offset) :
				    pread(disk->fd, s->iov->iov_base, s->iov->iov_len, offset);
		else
			n = write ? pwritev(disk->fd, s->iov, num, offset) :
				    preadv(disk->fd, s->iov, num, offset);
		if (unlikely(n <= 0)) {
			if (n < 0 && errno == EINTR)
				continue;
			/* 0: the file ends below the capacity that we announced. */
			return n < 0 ? -errno : -EIO;
		}
		offset += n;
		if (likely((size_t)n == s->len)) {
			s->len = 0;
			break;
		}
		span_skip(s, n);
	}
	return 0;
}

static unsigned transfer(const struct blk_disk *disk, bool write, struct span *s, uint64_t sector,
			 bool stable)
{
	/* Data comes in whole sectors (5.2.6.1); QEMU's devices refuse the rest in the same way. */
	if (unlikely(s->len % 512))
		return BLK_S_IOERR;
	if (unlikely(write && disk->read_only))
		return BLK_S_IOERR;
	if (unlikely(!in_disk(READ_ONCE(disk->capacity), sector, s->len >> BLK_SECTOR_SHIFT)))
		return BLK_S_IOERR;
	if (disk->fd < 0) {
		s->len = 0;
		return BLK_S_OK;
	}
	return span_io(disk, write, s, sector << BLK_SECTOR_SHIFT, stable) ? BLK_S_IOERR : BLK_S_OK;
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
	return range_fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
}

int blk_disk_zero(const struct blk_disk *disk, uint64_t offset, uint64_t len, bool unmap)
{
	int rc = -EOPNOTSUPP;

	if (disk->block_device)
		return range_ioctl(disk->fd, BLKZEROOUT, offset, len);
	if (unmap)
		rc = range_fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
	if (rc == -EOPNOTSUPP)
		rc = range_fallocate(disk->fd, FALLOC_FL_ZERO_RANGE, offset, len);
	if (rc == -EOPNOTSUPP)
		rc = range_write_zeroes(disk->fd, offset, len);
	return rc;
}

static unsigned ranges(const struct blk_disk *disk, bool discard, struct span *s, bool stable)
{
	struct blk_req_range range[BLK_RANGES_MAX];
	uint32_t max_sectors = discard ? disk->max_discard_sectors : disk->max_write_zeroes_sectors;
	uint32_t max_seg = discard ? disk->max_discard_seg : disk->max_write_zeroes_seg;
	uint64_t capacity = READ_ONCE(disk->capacity);
	uint64_t offset, len;
	unsigned i, n;
	int rc;

	n = s->len / sizeof(range[0]);
	if (s->len % sizeof(range[0]) || !n || n > max_seg || n > BLK_RANGES_MAX)
		return BLK_S_IOERR;
	span_take(s, range, s->len);
	/* All of them are looked at before the first is done, so that a bad one leaves no trace.
	 * The unknown flag decides over the bad range (5.2.6.2: MUST be UNSUPP). */
	for (i = 0; i < n; i++)
		if (range[i].flags & ~(discard ? 0 : BLK_RANGE_F_UNMAP))
			return BLK_S_UNSUPP;
	if (disk->read_only)
		return BLK_S_IOERR;
	for (i = 0; i < n; i++)
		if (range[i].num_sectors > max_sectors ||
		    !in_disk(capacity, range[i].sector, range[i].num_sectors))
			return BLK_S_IOERR;
	if (disk->fd < 0)
		return BLK_S_OK;
	for (i = 0; i < n; i++) {
		offset = range[i].sector << BLK_SECTOR_SHIFT;
		len = (uint64_t)range[i].num_sectors << BLK_SECTOR_SHIFT;
		if (!len)
			continue;
		rc = discard ? blk_disk_discard(disk, offset, len) :
			       blk_disk_zero(disk, offset, len, range[i].flags & BLK_RANGE_F_UNMAP);
		if (rc)
			return rc == -EOPNOTSUPP ? BLK_S_UNSUPP : BLK_S_IOERR;
	}
	/* A discard promises nothing about what is read afterwards, a zeroed range does. */
	if (stable && !discard && fdatasync(disk->fd))
		return BLK_S_IOERR;
	return BLK_S_OK;
}

static unsigned flush(const struct blk_disk *disk)
{
	if (disk->fd < 0)
		return BLK_S_OK;
	while (fdatasync(disk->fd))
		if (errno != EINTR)
			return BLK_S_IOERR;
	return BLK_S_OK;
}

static unsigned get_id(const struct blk_disk *disk, struct span *s)
{
	span_put(s, disk->serial, s->len < BLK_ID_BYTES ? s->len : BLK_ID_BYTES);
	return BLK_S_OK;
}

enum virtqueue_fault blk_request_serve(const struct blk_disk *disk, struct vhost_chain *chain,
				       bool writethrough, uint32_t *written)
{
	struct span out = { chain->iov, chain->out_num, chain->out_len, 0 };
	struct span in = { chain->iov + chain->out_num, chain->in_num, chain->in_len, 0 };
	struct blk_req_header header;
	uint32_t room;
	uint8_t *status_at;
	unsigned status;
	struct iovec *last;

	if (unlikely(out.len < sizeof(header)))
		return VQ_REQUEST_HEADER;
	if (unlikely(!in.len))
		return VQ_REQUEST_STATUS;
	span_take(&out, &header, sizeof(header));
	last = in.iov + in.num - 1;
	status_at = span_cut_last_byte(&in);
	room = in.len;

	switch (header.type) {
	case BLK_T_IN:
		status = transfer(disk, false, &in, header.sector, false);
		break;
	case BLK_T_OUT:
		status = transfer(disk, true, &out, header.sector, writethrough);
		break;
	case BLK_T_FLUSH:
		status = flush(disk);
		break;
	case BLK_T_GET_ID:
		status = get_id(disk, &in);
		break;
	case BLK_T_DISCARD:
	case BLK_T_WRITE_ZEROES:
		status = ranges(disk, header.type == BLK_T_DISCARD, &out, writethrough);
		break;
	default: /* SCSI, secure erase, lifetime, zones: not offered */
		status = BLK_S_UNSUPP;
	}
	WRITE_ONCE(*status_at, (uint8_t)status);
	*written = room - in.len + 1;
	span_restore(&in, last);
	return VQ_OK;
}
