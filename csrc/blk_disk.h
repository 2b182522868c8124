/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a block device serves: a file, a block device of this machine, or nothing, and the system calls on it.
 * Knows bytes and offsets that the caller has checked; knows neither requests nor rings.
 */
#ifndef VHOST_BLK_DISK_H
#define VHOST_BLK_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_map.h"
#include "blk_span.h"

#define BLK_SECTOR_SHIFT 9
#define BLK_ID_BYTES 20

/* How a disk answers to a request for bytes. */
enum blk_pace {
	BLK_WAITS,  /* not known: whoever asks may have to wait */
	BLK_CACHED, /* at once, if the kernel has them in its page cache */
	BLK_MEMORY, /* at once: it is on tmpfs, or there is nothing to move */
};

/* What all queues of a device share. Only `capacity` changes while requests run (READ_ONCE). */
struct blk_disk {
	int fd;		   /* -1: the null device, which moves no data at all */
	enum blk_pace pace;
	struct blk_map *map; /* NULL: none; the owner's */
	bool read_only;
	bool block_device; /* discards by ioctl rather than by punching holes */
	uint64_t capacity; /* 512-byte sectors */
	uint32_t max_discard_sectors, max_discard_seg;
	uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
	char serial[BLK_ID_BYTES];
};

/* That of an open file. */
enum blk_pace blk_disk_pace(int fd);

static inline bool blk_disk_has(const struct blk_disk *disk, uint64_t sector, uint64_t count)
{
	uint64_t capacity = READ_ONCE(disk->capacity);

	return sector <= capacity && count <= capacity - sector;
}

/*
 * Moves all of the span from or to the disk, from byte *at on; waits for as long as it takes. `stable`: a write
 * is on stable storage afterwards. 0 or a negative errno; what did move is gone from the span, *at is behind
 * it.
 */
int blk_disk_move(const struct blk_disk *disk, bool write, struct blk_span *s, uint64_t *at,
		  bool stable);

/* The same as far as nobody has to wait for it. 0: all of it; -EAGAIN: the rest has to be waited for;
 * -EOPNOTSUPP: this file knows no such thing; another negative errno. */
int blk_disk_move_now(const struct blk_disk *disk, bool write, struct blk_span *s, uint64_t *at);

/* Make a hole, and write zeroes (`unmap`: by a hole if that does it), in a part of the disk that is not empty:
 * bytes. 0 or a negative errno. */
int blk_disk_discard(const struct blk_disk *disk, uint64_t offset, uint64_t len);
int blk_disk_zero(const struct blk_disk *disk, uint64_t offset, uint64_t len, bool unmap);

/* What was written is on stable storage. 0 or a negative errno. */
int blk_disk_flush(const struct blk_disk *disk);

#endif
