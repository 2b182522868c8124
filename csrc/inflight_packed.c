/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * In-flight tracking of a packed ring: a copy of each descriptor that was popped, for used elements are
 * written over them. Entries that hold no copy form a list. One store to its head takes the entries of a
 * chain out of it, or puts them back, and so decides whether the chain is in flight; `inflight` only says
 * which entries outside of the list begin a chain.
 *
 * A batch becomes used with one store to the flags of its first element. Before it, the region says how
 * far used_idx and free_head will get; after it, old_used_idx and old_free_head follow. A successor that
 * finds the two used indices apart sees at the descriptor in between which of them is true.
 *
 * Elements of a batch behind the first have their flags already when that store happens. If it does not,
 * a successor takes them back: it may use other chains first, and the driver would come upon the flags.
 */
#include <errno.h>
#include <stdlib.h>

#include "chain_build.h"
#include "inflight.h"
#include "packed_ring.h"

static void set_free(struct inflight_packed_region *r, uint16_t head, uint16_t old)
{
	union inflight_free_heads heads = { { head, old } };

	WRITE_ONCE(r->free.word, heads.word);
	COMPILER_BARRIER();
}

static void set_used(struct inflight_packed_region *r, uint16_t used, bool wrap, uint16_t old,
		     bool old_wrap)
{
	union inflight_used u = { { used, old, wrap, old_wrap, { 0, 0 } } };

	WRITE_ONCE(r->used.word, u.word);
	COMPILER_BARRIER();
}

static void set_next(struct inflight *in, uint16_t at, uint16_t next)
{
	in->link[at].next = next;
	WRITE_ONCE(in->packed->desc[at].next, next);
}

static void first_use(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	struct inflight_packed_region *r = in->packed;

	for (uint32_t i = 0; i < in->desc_num; i++) {
		set_next(in, i, i + 1); /* desc_num ends the list */
		WRITE_ONCE(r->desc[i].inflight, 0);
	}
	WRITE_ONCE(r->desc_num, in->desc_num);
	set_free(r, 0, 0);
	set_used(r, vq->used, vq->used_wrap, vq->used, vq->used_wrap);
	WRITE_ONCE(r->version, INFLIGHT_VERSION);
}

/* ------------------------------------------------------------------ what a predecessor left */

/* Slots from one position to another that is at most a lap ahead, or more than there are. */
static uint32_t slots_between(const struct virtqueue *vq, uint16_t from, bool from_wrap, uint16_t to,
			      bool to_wrap)
{
	if (from_wrap == to_wrap)
		return to >= from ? (uint32_t)to - from : UINT32_MAX;
	return to <= from ? vq->num - from + to : UINT32_MAX;
}

/* None of these was seen: the first element's flags were not written. */
static void take_back_flags(struct virtqueue *vq, uint16_t pos, bool wrap, uint32_t slots)
{
	for (uint32_t i = 0; i < slots; i++) {
		uint16_t *flags = &vq->packed.desc[pos].flags, now = READ_ONCE(*flags);

		if ((now & AVAIL_USED) == used_flags(wrap))
			WRITE_ONCE(*flags, (now & ~AVAIL_USED) | available_flags(wrap));
		advance(vq, &pos, &wrap, 1);
	}
	COMPILER_BARRIER();
}

/* Finishes a batch that was published, or undoes one that was not. */
static int finish_batch(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	struct inflight_packed_region *r = in->packed;
	union inflight_free_heads heads = { .word = READ_ONCE(r->free.word) };
	union inflight_used u = { .word = READ_ONCE(r->used.word) };
	uint32_t slots;

	if (u.used_wrap_counter > 1 || u.old_used_wrap_counter > 1)
		return vq_fault(vq, VQ_INFLIGHT_FLAG, 0,
				u.used_wrap_counter > 1 ? u.used_wrap_counter : u.old_used_wrap_counter, 2);
	if (u.used_idx >= vq->num || u.old_used_idx >= vq->num)
		return vq_fault(vq, VQ_INFLIGHT_INDEX, 0,
				u.used_idx >= vq->num ? u.used_idx : u.old_used_idx, vq->num);
	slots = slots_between(vq, u.old_used_idx, u.old_used_wrap_counter, u.used_idx,
			      u.used_wrap_counter);
	if (slots > vq->num)
		return vq_fault(vq, VQ_INFLIGHT_BATCH, 0, u.used_idx, vq->num);
	if (slots && !is_available(READ_ONCE(vq->packed.desc[u.old_used_idx].flags),
				   u.old_used_wrap_counter)) {
		heads.old_free_head = heads.free_head;
		u.old_used_idx = u.used_idx;
		u.old_used_wrap_counter = u.used_wrap_counter;
	} else {
		take_back_flags(vq, u.old_used_idx, u.old_used_wrap_counter, slots);
	}
	in->free = heads.old_free_head;
	set_free(r, in->free, in->free);
	vq->used = vq->staged = u.old_used_idx;
	vq->used_wrap = vq->staged_wrap = u.old_used_wrap_counter;
	set_used(r, vq->used, vq->used_wrap, vq->used, vq->used_wrap);
	return 0;
}

/* Marks the entry as accounted for; it may not have been. */
static int account(struct virtqueue *vq, bool *seen, uint16_t at)
{
	if (at >= vq->inflight->desc_num)
		return vq_fault(vq, VQ_INFLIGHT_INDEX, at, at, vq->inflight->desc_num);
	if (seen[at])
		return vq_fault(vq, VQ_INFLIGHT_LIST, at, at, 0);
	seen[at] = true;
	return 0;
}

/* The list of free entries. What was in the middle of being popped or used is in it, too. */
static int walk_free(struct virtqueue *vq, bool *seen, uint32_t *accounted)
{
	struct inflight *in = vq->inflight;

	for (uint16_t at = in->free; at != in->desc_num; at = in->link[at].next) {
		if (account(vq, seen, at))
			return -1;
		in->link[at].next = READ_ONCE(in->packed->desc[at].next);
		WRITE_ONCE(in->packed->desc[at].inflight, 0);
		++*accounted;
	}
	return 0;
}

/* The chain that begins in this entry. */
static int walk_chain(struct virtqueue *vq, bool *seen, uint32_t *accounted, uint16_t head)
{
	struct inflight *in = vq->inflight;
	struct inflight_packed_desc *desc = in->packed->desc;
	struct inflight_link *link = &in->link[head];
	uint16_t at = head;

	link->num = READ_ONCE(desc[head].num);
	link->last = READ_ONCE(desc[head].last);
	if (!link->num || link->num > vq->num)
		return vq_fault(vq, VQ_INFLIGHT_COUNT, head, link->num, vq->num + 1);
	for (uint16_t i = 0;; at = in->link[at].next) {
		if (account(vq, seen, at))
			return -1;
		in->link[at].next = READ_ONCE(desc[at].next);
		++*accounted;
		if (++i == link->num)
			break;
	}
	if (at != link->last)
		return vq_fault(vq, VQ_INFLIGHT_LIST, head, at, 0);
	return 0;
}

/* Each entry is in the free list or in one chain. */
static int look_through(struct virtqueue *vq, bool *seen)
{
	struct inflight *in = vq->inflight;
	struct inflight_packed_desc *desc = in->packed->desc;
	uint32_t accounted = 0, slots = 0;

	if (walk_free(vq, seen, &accounted))
		return -1;
	for (uint32_t i = 0; i < in->desc_num; i++) {
		uint8_t flag = READ_ONCE(desc[i].inflight);

		if (flag > 1)
			return vq_fault(vq, VQ_INFLIGHT_FLAG, i, flag, 2);
		if (!flag)
			continue;
		if (walk_chain(vq, seen, &accounted, i))
			return -1;
		slots += in->link[i].num;
		inflight_add_old(in, i, READ_ONCE(desc[i].counter));
	}
	if (accounted != in->desc_num)
		return vq_fault(vq, VQ_INFLIGHT_LIST, in->free, accounted, in->desc_num);
	if (slots > vq->num)
		return vq_fault(vq, VQ_INFLIGHT_COUNT, 0, slots, vq->num + 1);
	vq->last_avail = vq->used;
	vq->avail_wrap = vq->used_wrap;
	advance(vq, &vq->last_avail, &vq->avail_wrap, slots);
	return 0;
}

int inflight_packed_start(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	uint16_t version = READ_ONCE(in->packed->version);
	uint16_t desc_num = READ_ONCE(in->packed->desc_num);
	bool *seen;
	int rc;

	if (!version) {
		first_use(vq);
		return 0;
	}
	if (inflight_known(vq, version, desc_num))
		return -EBADMSG;
	seen = calloc(in->desc_num, sizeof(*seen));
	if (!seen)
		return -ENOMEM;
	rc = finish_batch(vq) || look_through(vq, seen) ? -EBADMSG : 0;
	free(seen);
	inflight_sort(in);
	return rc;
}

/* ------------------------------------------------------------------ what we do */

/* The ring is read a second time, for the log alone: who changes it meanwhile lies to himself. Where the
 * chain ends is as it was seen. */
void inflight_packed_popped(struct virtqueue *vq, uint16_t id, uint16_t ndesc, uint16_t pos)
{
	struct inflight *in = vq->inflight;
	uint16_t head = in->free, at = head, last = head;
	struct inflight_packed_desc *h = &in->packed->desc[head];
	bool wrap = false;

	for (uint16_t i = 0; i < ndesc; i++) {
		struct inflight_packed_desc *e = &in->packed->desc[at];
		struct raw_desc d = fetch_desc(&vq->packed.desc[pos]);
		uint16_t flags = raw_fourth(d) & ~VRING_DESC_F_NEXT;

		WRITE_ONCE(e->addr, d.addr);
		WRITE_ONCE(e->len, raw_len(d));
		WRITE_ONCE(e->id, raw_third(d));
		WRITE_ONCE(e->flags, flags | (i + 1 < ndesc ? VRING_DESC_F_NEXT : 0));
		last = at;
		at = in->link[at].next;
		advance(vq, &pos, &wrap, 1);
	}
	in->entry[id] = head;
	in->link[head].num = ndesc;
	in->link[head].last = last;
	WRITE_ONCE(h->num, ndesc);
	WRITE_ONCE(h->last, last);
	WRITE_ONCE(h->counter, in->counter++);
	WRITE_ONCE(h->inflight, 1);
	COMPILER_BARRIER();
	in->free = at;
	set_free(in->packed, at, at);
}

void inflight_packed_forget(struct virtqueue *vq, uint16_t id)
{
	struct inflight *in = vq->inflight;
	uint16_t head = in->entry[id];

	/* Nobody looks at the link of a chain's last entry before the chain is free. */
	set_next(in, in->link[head].last, in->free);
	COMPILER_BARRIER();
	in->free = head;
	set_free(in->packed, head, head);
	WRITE_ONCE(in->packed->desc[head].inflight, 0);
}

void inflight_packed_staged(struct virtqueue *vq, uint16_t id, uint16_t ndesc)
{
	struct inflight *in = vq->inflight;
	uint16_t pos = vq->staged;
	bool wrap = vq->staged_wrap;

	in->batch[in->batched++] = in->entry[id];
	advance(vq, &pos, &wrap, ndesc);
	set_used(in->packed, pos, wrap, vq->used, vq->used_wrap);
}

void inflight_packed_publish(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;
	uint16_t head = in->free;

	for (uint32_t i = 0; i < in->batched; i++) {
		set_next(in, in->link[in->batch[i]].last, head);
		head = in->batch[i];
	}
	COMPILER_BARRIER();
	set_free(in->packed, head, in->free);
	in->free = head;
}

void inflight_packed_published(struct virtqueue *vq)
{
	struct inflight *in = vq->inflight;

	COMPILER_BARRIER();
	for (uint32_t i = 0; i < in->batched; i++)
		WRITE_ONCE(in->packed->desc[in->batch[i]].inflight, 0);
	in->batched = 0;
	COMPILER_BARRIER();
	set_free(in->packed, in->free, in->free);
	set_used(in->packed, vq->used, vq->used_wrap, vq->used, vq->used_wrap);
}
