// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * csrc's device side on the benchmark's ring: pop (one by one, or in batches), fill, one flush and
 * one decision to notify a batch, the shape of an engine's loop.
 */
#include <stdlib.h>

#include "ring_floor.h"
#include "virtqueue.h"

#define AT_ONCE 32

struct ring_engine {
	struct guest_memory mem;
	struct virtqueue vq;
	struct vhost_chain chains[AT_ONCE];
	struct vhost_chain *list[AT_ONCE];
};

int ring_engine_new(struct ring_bench *r)
{
	struct ring_engine *e = calloc(1, sizeof(*e));
	struct virtqueue_config cfg = {
		.areas = {r->desc, r->avail, r->used},
		.mem = &e->mem,
		.num = r->num,
		.base = r->packed ? 0x80008000u : 0,
		.packed = r->packed,
		.indirect = true,
		.event_idx = true,
	};
	uint32_t bad;
	int rc = guest_memory_init(&e->mem, r->regions, r->nregions, &bad);

	for (int i = 0; i < AT_ONCE; i++) {
		vhost_chain_init(&e->chains[i]);
		e->list[i] = &e->chains[i];
	}
	if (!rc)
		rc = virtqueue_init(&e->vq, &cfg);
	r->engine = e;
	return rc;
}

void ring_engine_delete(struct ring_bench *r)
{
	struct ring_engine *e = r->engine;

	virtqueue_destroy(&e->vq);
	guest_memory_destroy(&e->mem);
	for (int i = 0; i < AT_ONCE; i++)
		vhost_chain_destroy(&e->chains[i]);
	free(e);
}

static void one_by_one(void *device)
{
	struct ring_bench *r = device;
	struct ring_engine *e = r->engine;
	struct vhost_chain *c = &e->chains[0];

	while (virtqueue_pop(&e->vq, c) > 0) {
		ring_consume(c->iov);
		virtqueue_fill(&e->vq, c->id, c->in_len);
	}
	virtqueue_flush(&e->vq);
	r->notified += virtqueue_should_notify(&e->vq);
}

static void batched(void *device)
{
	struct ring_bench *r = device;
	struct ring_engine *e = r->engine;
	struct virtqueue_used used[AT_ONCE];

	for (int n = AT_ONCE; n == AT_ONCE;) {
		n = virtqueue_pop_batch(&e->vq, e->list, AT_ONCE);
		for (int i = 0; i < n; i++) {
			ring_consume(e->chains[i].iov);
			used[i] = (struct virtqueue_used){ e->chains[i].id, e->chains[i].in_len };
		}
		if (n > 0)
			virtqueue_fill_batch(&e->vq, used, (unsigned)n);
	}
	virtqueue_flush(&e->vq);
	r->notified += virtqueue_should_notify(&e->vq);
}

uint64_t ring_engine_run(struct ring_bench *r, bool in_batches, uint32_t rounds, uint32_t chains, uint32_t batch)
{
	return ring_run(r, in_batches ? batched : one_by_one, r, rounds, chains, batch);
}
