/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#include "blk_merge.h"

/* Can `r` be done in one go with an operation that ends with `newest`? */
static bool fits(const struct blk_request *op, const struct blk_request *newest,
		 const struct blk_request *r)
{
	uint32_t num = op->joined ? op->joint.num : op->data.num;
	uint32_t len = op->joined ? op->joint.len : op->data.len;

	return (r->todo == BLK_READ || r->todo == BLK_WRITE) && r->todo == op->todo &&
	       r->at == newest->at + newest->data.len &&
	       num + r->data.num <= BLK_MERGE_MAX && (uint64_t)len + r->data.len <= BLK_MERGE_BYTES;
}

static void take_in(struct blk_request *op, const struct blk_request *r)
{
	memcpy(op->joint.iov + op->joint.num, r->data.iov, r->data.num * sizeof(*r->data.iov));
	op->joint.num += r->data.num;
	op->joint.len += r->data.len;
}

static void join(struct blk_request *op, struct blk_request *newest, struct blk_request *r)
{
	if (!op->joined) {
		op->joint = (struct blk_span){ op->joint_iov, 0, 0, 0 };
		op->joint_at = op->at;
		take_in(op, op);
	}
	take_in(op, r);
	newest->joined = r;
}

void blk_batch_add(struct blk_batch *b, struct blk_request *r)
{
	r->next = r->joined = NULL;
	if (b->op && fits(b->op, b->newest, r)) {
		join(b->op, b->newest, r);
	} else {
		*b->end = b->op = r;
		b->end = &r->next;
	}
	b->newest = r;
}

void blk_op_done(struct blk_request *op)
{
	for (; op; op = op->joined) {
		op->data.len = 0;
		blk_request_done(op, 0);
	}
}

void blk_op_run(const struct blk_disk *disk, struct blk_request *op)
{
	/* What a short one did move is moved once more: no harm in that. */
	if (op->joined &&
	    !blk_disk_move(disk, op->todo == BLK_WRITE, &op->joint, &op->joint_at, op->stable)) {
		blk_op_done(op);
		return;
	}
	for (; op; op = op->joined)
		blk_request_run(disk, op);
}
