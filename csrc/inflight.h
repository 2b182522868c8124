/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * In-flight tracking (vhost-user, "Inflight I/O tracking"): what a device has popped and not yet used is
 * written down in a region that outlives it, so that its successor can go on after a SIGKILL.
 *
 * The order of the stores is the whole point: the process may end between any two instructions, and the
 * region and the ring then have to say together what was in flight. An ended process has done all
 * stores before that instruction and none after it, so that compiler barriers are enough.
 *
 * The region is shared with a front-end that may write to it at any time. It is read at the start, each
 * field once, and checked; from then on it is only written, and what is needed again is kept here. The
 * one exception are saved descriptors, which are checked as those of a ring are.
 *
 * inflight.c has what both formats share, inflight_split.c and inflight_packed.c the same functions in
 * the same order. Knows positions and heads, not what a chain holds.
 */
#ifndef VHOST_INFLIGHT_H
#define VHOST_INFLIGHT_H

#include "virtqueue.h"

#define INFLIGHT_ALIGN 64u /* of the region of each queue */
#define INFLIGHT_VERSION 1 /* 0: nobody used the region yet */

#define COMPILER_BARRIER() __atomic_signal_fence(__ATOMIC_SEQ_CST)

struct inflight_split_desc {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct inflight_split_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct inflight_split_desc desc[];
};

struct inflight_packed_desc {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next, last, num;
	uint64_t counter;
	uint16_t id, flags;
	uint32_t len;
	uint64_t addr;
};

/* Things that have to change together are written together. */
union inflight_free_heads {
	struct {
		uint16_t free_head, old_free_head;
	};
	uint32_t word;
};

union inflight_used {
	struct {
		uint16_t used_idx, old_used_idx;
		uint8_t used_wrap_counter, old_used_wrap_counter;
		uint8_t padding[2];
	};
	uint64_t word;
};

struct inflight_packed_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	union inflight_free_heads free;
	union inflight_used used;
	uint8_t padding[5];
	struct inflight_packed_desc desc[];
};

_Static_assert(sizeof(struct inflight_split_desc) == 16, "DescStateSplit");
_Static_assert(offsetof(struct inflight_split_region, desc) == 16, "QueueRegionSplit");
_Static_assert(sizeof(struct inflight_packed_desc) == 32, "DescStatePacked");
_Static_assert(offsetof(struct inflight_packed_region, free) == 12, "QueueRegionPacked");
_Static_assert(offsetof(struct inflight_packed_region, used) == 16, "QueueRegionPacked");
_Static_assert(offsetof(struct inflight_packed_region, desc) == 32, "QueueRegionPacked");

/* One that was in flight: its head (split) or first entry (packed), and when it was popped. */
struct inflight_old {
	uint64_t counter;
	uint16_t at;
};

/* What the region says of an entry (packed), as we wrote or checked it. */
struct inflight_link {
	uint16_t next, last, num;
};

struct inflight {
	union {
		struct inflight_split_region *split;
		struct inflight_packed_region *packed;
	};
	uint32_t desc_num; /* entries; at least as many as the ring has slots */
	uint64_t counter;  /* of the next pop */
	uint64_t first;	   /* what it was at the start */
	/* What a predecessor left, in the order in which it was popped. */
	struct inflight_old *old;
	uint32_t old_num, old_popped;
	/* What is staged: heads (split) or first entries (packed). */
	uint16_t *batch;
	uint32_t batched;
	uint16_t batch_head; /* split: of the list of staged ones in the region */
	/* Packed. `free` is what was committed: chains that are staged join it when they are published. */
	uint16_t free;
	struct inflight_link *link; /* desc_num */
	uint16_t *entry;	    /* num: first entry of the chain with this buffer id */
};

/* Bytes of the region of one queue. */
static inline uint64_t inflight_region_size(uint32_t desc_num, bool packed)
{
	uint64_t size = packed ? offsetof(struct inflight_packed_region, desc) +
					 (uint64_t)desc_num * sizeof(struct inflight_packed_desc) :
				 offsetof(struct inflight_split_region, desc) +
					 (uint64_t)desc_num * sizeof(struct inflight_split_desc);

	return (size + INFLIGHT_ALIGN - 1) / INFLIGHT_ALIGN * INFLIGHT_ALIGN;
}

/* The memory for it: 0, -ENOMEM, or -EBADMSG with a report of the queue: fewer entries than the ring. */
int inflight_alloc(struct virtqueue *vq, void *region, uint32_t desc_num);
void inflight_free(struct virtqueue *vq);

/* Something that was in flight is still to be popped again. */
static inline bool inflight_pending(const struct virtqueue *vq)
{
	return unlikely(vq->inflight) && vq->inflight->old_popped < vq->inflight->old_num;
}

/* One that a predecessor left was popped again: its id. */
void inflight_popped_again(struct virtqueue *vq, uint16_t id);

/* The chain that was popped last is given back. True: it was a predecessor's, and not in the ring. */
bool inflight_unpop(struct virtqueue *vq, uint16_t id);

/* Helpers of both formats. _known: is the region, which was used before, one of ours and for this size? 0, or
 * -EBADMSG with the report. */
int inflight_known(struct virtqueue *vq, uint16_t version, uint16_t desc_num);
void inflight_sort(struct inflight *in);
void inflight_add_old(struct inflight *in, uint16_t at, uint64_t counter);

/*
 * What the formats do. _start repairs what was left half-done and sets the queue's positions; 0, or
 * -EBADMSG with a report of the queue. It is called when the ring's positions are set as without tracking,
 * which is where it leaves them if nobody used the region yet. _popped: after a chain was taken from the
 * ring, packed with the position where it began. _staged: before its used element is written. Around the
 * store that publishes them: _publish (packed only) before it, _published after it, `used` being new.
 */
int inflight_split_start(struct virtqueue *vq, uint16_t avail_idx);
void inflight_split_popped(struct virtqueue *vq, uint16_t id);
void inflight_split_forget(struct virtqueue *vq, uint16_t id);
void inflight_split_staged(struct virtqueue *vq, uint16_t id);
void inflight_split_published(struct virtqueue *vq);

int inflight_packed_start(struct virtqueue *vq);
void inflight_packed_popped(struct virtqueue *vq, uint16_t id, uint16_t ndesc, uint16_t pos);
void inflight_packed_forget(struct virtqueue *vq, uint16_t id);
void inflight_packed_staged(struct virtqueue *vq, uint16_t id, uint16_t ndesc);
void inflight_packed_publish(struct virtqueue *vq);
void inflight_packed_published(struct virtqueue *vq);

#endif
