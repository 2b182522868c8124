/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * One virtio-blk request: from a chain to system calls to a status byte (VIRTIO 1.2, 5.2.6).
 * Knows files and chains, but no rings, no threads and no notifications: engine_blk.h has those.
 */
#ifndef VHOST_BLK_REQUEST_H
#define VHOST_BLK_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "chain.h"
#include "virtqueue.h"

#define BLK_SECTOR_SHIFT 9
#define BLK_ID_BYTES 20
#define BLK_RANGES_MAX 32u /* segments of a discard or write-zeroes that we copy at once */

#define BLK_T_IN 0u
#define BLK_T_OUT 1u
#define BLK_T_FLUSH 4u
#define BLK_T_GET_ID 8u
#define BLK_T_DISCARD 11u
#define BLK_T_WRITE_ZEROES 13u

#define BLK_S_OK 0u
#define BLK_S_IOERR 1u
#define BLK_S_UNSUPP 2u

struct blk_req_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct blk_req_range { /* struct virtio_blk_discard_write_zeroes */
	uint64_t sector;
	uint32_t num_sectors;
	uint32_t flags;
};

#define BLK_RANGE_F_UNMAP 1u

_Static_assert(sizeof(struct blk_req_header) == 16, "5.2.6");
_Static_assert(sizeof(struct blk_req_range) == 16, "5.2.6");

/* What all queues of a device share. Only `capacity` changes while requests run (READ_ONCE). */
struct blk_disk {
	int fd;		   /* -1: the null device, which moves no data at all */
	bool read_only;
	bool block_device; /* discards by ioctl rather than by punching holes */
	uint64_t capacity; /* 512-byte sectors */
	uint32_t max_discard_sectors, max_discard_seg;
	uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
	char serial[BLK_ID_BYTES];
};

/*
 * Serves the chain: does what it asks for, writes its status byte. With `writethrough` a write is
 * on stable storage before this returns. The chain's readable iovecs are used up, the
 * writable ones are as they were: where something may have been written.
 *
 * VQ_OK: *written is what to put into the used element: the data bytes that were written, and the
 * status. Otherwise the chain cannot be answered (no header, no room for a status), nothing was
 * done, and the queue has to break.
 */
enum virtqueue_fault blk_request_serve(const struct blk_disk *disk, struct vhost_chain *chain,
				       bool writethrough, uint32_t *written);

/* Make a hole, and write zeroes (`unmap`: by a hole if that does it), in a part of the disk that the caller
 * has checked, and that is not empty: bytes. 0 or a negative errno. */
int blk_disk_discard(const struct blk_disk *disk, uint64_t offset, uint64_t len);
int blk_disk_zero(const struct blk_disk *disk, uint64_t offset, uint64_t len, bool unmap);

/* Bytes that blk_request_serve wanted and did not get, for the fault report. */
static inline uint64_t blk_request_missing(const struct vhost_chain *chain,
					   enum virtqueue_fault fault, uint64_t *limit)
{
	*limit = fault == VQ_REQUEST_HEADER ? sizeof(struct blk_req_header) : 1;
	return fault == VQ_REQUEST_HEADER ? chain->out_len : chain->in_len;
}

#endif
