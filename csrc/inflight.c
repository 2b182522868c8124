/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What split and packed rings share of in-flight tracking: its memory, and the order of what is done
 * again. */
#include "inflight.h"

#include <errno.h>
#include <stdlib.h>

#include "chain_build.h"

int inflight_alloc(struct virtqueue *vq, void *region, uint32_t desc_num)
{
	struct inflight *in;

	/* Entries are counted in 16 bits, the one that ends a list included. */
	if (desc_num < vq->num || desc_num > UINT16_MAX) {
		vq_fault(vq, VQ_INFLIGHT_SIZE, 0, desc_num, vq->num);
		return -EBADMSG;
	}
	in = vq->inflight = calloc(1, sizeof(*in));
	if (!in)
		return -ENOMEM;
	in->split = region;
	in->desc_num = desc_num;
	in->batch = calloc(vq->num, sizeof(*in->batch));
	in->old = calloc(desc_num, sizeof(*in->old));
	/* Split rings need the links at the start, to see whether a list comes to an entry again. */
	in->link = calloc(desc_num, sizeof(*in->link));
	in->entry = calloc(vq->num, sizeof(*in->entry));
	if (!in->batch || !in->old || !in->link || !in->entry) {
		inflight_free(vq);
		return -ENOMEM;
	}
	return 0;
}

void inflight_free(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;

	if (!in)
		return;
	free(in->batch);
	free(in->old);
	free(in->link);
	free(in->entry);
	free(in);
	vq->inflight = NULL;
}

void inflight_popped_again(struct virtqueue *vq, uint16_t id)
{
	struct inflight *in = vq->inflight;

	in->entry[id] = in->old[in->old_popped++].at;
}

bool inflight_unpop(struct virtqueue *vq, uint16_t id)
{
	struct inflight *in = vq->inflight;

	/* Nothing was popped from the ring that has not been given back: the newest is older than that. */
	if (in->counter == in->first) {
		in->old_popped--;
		return true;
	}
	in->counter--;
	if (vq->is_packed)
		inflight_packed_forget(vq, id);
	else
		inflight_split_forget(vq, id);
	return false;
}

int inflight_known(struct virtqueue *vq, uint16_t version, uint16_t desc_num)
{
	uint32_t wanted = vq->inflight->desc_num;

	if (version != INFLIGHT_VERSION)
		vq_fault(vq, VQ_INFLIGHT_VERSION, 0, version, INFLIGHT_VERSION + 1);
	else if (desc_num != wanted)
		vq_fault(vq, VQ_INFLIGHT_SIZE, 0, desc_num, wanted);
	else
		return 0;
	return -EBADMSG;
}

void inflight_add_old(struct inflight *in, uint16_t at, uint64_t counter)
{
	in->old[in->old_num++] = (struct inflight_old){ counter, at };
}

static int older(const void *a, const void *b)
{
	const struct inflight_old *x = a, *y = b;

	if (x->counter != y->counter)
		return x->counter < y->counter ? -1 : 1;
	return x->at < y->at ? -1 : 1; /* ours never are the same */
}

void inflight_sort(struct inflight *in)
{
	qsort(in->old, in->old_num, sizeof(*in->old), older);
	in->counter = in->first = in->old_num ? in->old[in->old_num - 1].counter + 1 : 0;
}
