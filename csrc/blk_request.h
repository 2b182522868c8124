/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * One virtio-blk request (VIRTIO 1.2, 5.2.6), from a chain to what is to be done on the disk to a status byte.
 * Knows disks and chains, but no rings, no threads and no notifications: engine_blk.h has those.
 *
 *	parse -> ended, or to be done: at once (now), or by somebody who waits for it (run) -> end
 */
#ifndef VHOST_BLK_REQUEST_H
#define VHOST_BLK_REQUEST_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include "blk_disk.h"
#include "chain.h"
#include "virtqueue.h"

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

struct blk_pool_user;

enum blk_todo {
	BLK_NOTHING, /* it has its status */
	BLK_READ,
	BLK_WRITE,
	BLK_FLUSH,
	BLK_DISCARD,
	BLK_ZERO,
};

struct blk_request {
	struct vhost_chain chain; /* popped into it; its owner's to init and to destroy */
	/* From parse to end. */
	struct blk_span data; /* what is left to move, or the segments of a discard */
	uint64_t at;	      /* where on the disk, in bytes */
	uint8_t *status_at;
	struct iovec *last;   /* the iovec that the status byte was cut off */
	uint32_t room;	      /* for data, of the driver's */
	uint8_t todo;	      /* enum blk_todo */
	uint8_t status;
	bool stable;	      /* what is written is to be on stable storage before the status is */
	bool fills;	      /* `data` is the writable part */
	/* Of whoever has it while it is done. */
	struct blk_request *next;
	struct blk_pool_user *owner;
	/* Others that are done with this one, which is the first of them on the disk: see blk_merge.h. */
	struct blk_request *joined;
	struct blk_span joint; /* ... what is left to move of all of them, and where */
	uint64_t joint_at;
	struct iovec *joint_iov; /* room for BLK_MERGE_MAX of them; the owner's */
};

/*
 * Looks at what was popped into r->chain. With `writethrough` a write is stable before it ends. VQ_OK:
 * r->todo says what is to be done. Otherwise the chain cannot be answered (no header, no room for a status), and
 * the queue has to break.
 */
enum virtqueue_fault blk_request_parse(const struct blk_disk *disk, struct blk_request *r,
				       bool writethrough);

/* Does it, for as long as that takes. For any thread. */
void blk_request_run(const struct blk_disk *disk, struct blk_request *r);

/* What came of it: 0 or a negative errno. */
static inline void blk_request_done(struct blk_request *r, int rc)
{
	r->todo = BLK_NOTHING;
	r->status = likely(!rc) ? BLK_S_OK : rc == -EOPNOTSUPP ? BLK_S_UNSUPP : BLK_S_IOERR;
}

/* Writes the status. What to put into the used element: the bytes of data that were written, and the status.
 * The chain's writable iovecs are as they were: where something may have been written. */
uint32_t blk_request_end(struct blk_request *r);

/* Bytes that blk_request_parse wanted and did not get, for the fault report. */
static inline uint64_t blk_request_missing(const struct vhost_chain *chain,
					   enum virtqueue_fault fault, uint64_t *limit)
{
	*limit = fault == VQ_REQUEST_HEADER ? sizeof(struct blk_req_header) : 1;
	return fault == VQ_REQUEST_HEADER ? chain->out_len : chain->in_len;
}

#endif
