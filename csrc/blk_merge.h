/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Requests that are neighbours on the disk, done together: one submission instead of many. Knows requests,
 * not who does them.
 *
 * An operation is a request, with others that are joined to it; each of them can still be done alone.
 */
#ifndef VHOST_BLK_MERGE_H
#define VHOST_BLK_MERGE_H

#include "blk_request.h"

#define BLK_MERGE_MAX 32u	     /* pieces of memory */
#define BLK_MERGE_BYTES (1u << 20)   /* nobody waits longer for the others than it takes to move that */

/* Operations that are still to be submitted, in the order in which their first requests came. */
struct blk_batch {
	struct blk_request *first, **end;
	struct blk_request *op, *newest; /* the newest operation, and the last of its requests */
};

static inline void blk_batch_init(struct blk_batch *b)
{
	b->first = b->op = b->newest = NULL;
	b->end = &b->first;
}

/* Adds a request that was parsed: to the newest operation if it goes on where that ends on the disk. */
void blk_batch_add(struct blk_batch *b, struct blk_request *r);

/* Where an operation moves data, and what is left of it. */
static inline struct blk_span *blk_op_span(struct blk_request *op)
{
	return op->joined ? &op->joint : &op->data;
}

static inline uint64_t *blk_op_at(struct blk_request *op)
{
	return op->joined ? &op->joint_at : &op->at;
}

/* The data of all its requests was moved. */
void blk_op_done(struct blk_request *op);

/* Does the operation, for as long as that takes; joined requests one by one where one of them fails. */
void blk_op_run(const struct blk_disk *disk, struct blk_request *op);

#endif
