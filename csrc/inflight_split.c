/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * In-flight tracking of a split ring: a flag for each head. Together with used.idx they say where in the
 * available ring the device is, for all that was popped is either used or in flight.
 *
 * A batch becomes used with one store of used.idx; its flags are taken away after it. A successor that
 * finds used.idx ahead of the region's used_idx knows that this was not finished, and how long the batch
 * was; which heads are in it, the list says that begins at last_batch_head.
 */
#include <errno.h>

#include "chain_build.h"
#include "inflight.h"

static void first_use(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	struct inflight_split_region *r = in->split;

	for (uint32_t i = 0; i < in->desc_num; i++)
		WRITE_ONCE(r->desc[i].inflight, 0);
	WRITE_ONCE(r->last_batch_head, 0);
	WRITE_ONCE(r->used_idx, vq->used);
	WRITE_ONCE(r->desc_num, in->desc_num);
	COMPILER_BARRIER();
	WRITE_ONCE(r->version, INFLIGHT_VERSION);
}

/* Finishes what a predecessor did not: it published a batch. */
static int finish_batch(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	struct inflight_split_region *r = in->split;
	uint16_t batch = vq->used - READ_ONCE(r->used_idx);
	uint16_t at = READ_ONCE(r->last_batch_head);

	if (batch > vq->num)
		return vq_fault(vq, VQ_INFLIGHT_BATCH, 0, batch, vq->num + 1);
	for (uint16_t i = 0; i < batch; i++) {
		if (at >= vq->num)
			return vq_fault(vq, VQ_INFLIGHT_INDEX, at, at, vq->num);
		if (in->link[at].num++)
			return vq_fault(vq, VQ_INFLIGHT_LIST, at, i, batch);
		WRITE_ONCE(r->desc[at].inflight, 0);
		at = READ_ONCE(r->desc[at].next);
	}
	COMPILER_BARRIER();
	WRITE_ONCE(r->used_idx, vq->used);
	return 0;
}

int inflight_split_start(struct virtqueue *vq, uint16_t avail_idx)
{
	struct inflight *in = vq->inflight;
	struct inflight_split_region *r = in->split;
	uint16_t version = READ_ONCE(r->version), desc_num = READ_ONCE(r->desc_num);
	uint16_t ahead = avail_idx - vq->used;

	if (!version) {
		first_use(vq);
		return 0;
	}
	if (inflight_known(vq, version, desc_num) || finish_batch(vq))
		return -EBADMSG;
	for (uint32_t i = 0; i < in->desc_num; i++) {
		uint8_t flag = READ_ONCE(r->desc[i].inflight);

		if (!flag)
			continue;
		if (flag > 1 || i >= vq->num) {
			vq_fault(vq, flag > 1 ? VQ_INFLIGHT_FLAG : VQ_INFLIGHT_INDEX, i,
				 flag > 1 ? flag : i, flag > 1 ? 2 : vq->num);
			return -EBADMSG;
		}
		inflight_add_old(in, i, READ_ONCE(r->desc[i].counter));
	}
	/* What is in flight was made available, and not used. */
	if (ahead > vq->num || in->old_num > ahead) {
		vq_fault(vq, VQ_INFLIGHT_COUNT, 0, in->old_num, (ahead > vq->num ? 0 : ahead) + 1u);
		return -EBADMSG;
	}
	inflight_sort(in);
	in->batch_head = READ_ONCE(r->last_batch_head);
	vq->last_avail = vq->shadow_avail = (uint16_t)(vq->used + in->old_num);
	return 0;
}

void inflight_split_popped(struct virtqueue *vq, uint16_t id)
{
	struct inflight *in = vq->inflight;
	struct inflight_split_desc *d = &in->split->desc[id];

	WRITE_ONCE(d->counter, in->counter++);
	COMPILER_BARRIER();
	WRITE_ONCE(d->inflight, 1);
	COMPILER_BARRIER(); /* before anything is done for the chain */
}

void inflight_split_forget(struct virtqueue *vq, uint16_t id)
{
	WRITE_ONCE(vq->inflight->split->desc[id].inflight, 0);
}

void inflight_split_staged(struct virtqueue *vq, uint16_t id)
{
	struct inflight *in = vq->inflight;

	in->batch[in->batched++] = id;
	WRITE_ONCE(in->split->desc[id].next, in->batch_head);
	COMPILER_BARRIER();
	WRITE_ONCE(in->split->last_batch_head, id);
	in->batch_head = id;
	COMPILER_BARRIER();
}

void inflight_split_published(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;

	COMPILER_BARRIER();
	for (uint32_t i = 0; i < in->batched; i++)
		WRITE_ONCE(in->split->desc[in->batch[i]].inflight, 0);
	in->batched = 0;
	COMPILER_BARRIER();
	WRITE_ONCE(in->split->used_idx, vq->used);
}
