/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The whole public C interface of the rings: a queue as its device and as its driver see it, split
 * and packed behind one set of functions. The format is chosen once, at init.
 *
 * No function here allocates after init (a chain's spill apart), logs, or aborts. Nothing is thread
 * safe: one thread at a time per queue side; the other side is another thread, process or guest.
 *
 * Faults: what the other side put into shared memory and broke the rules with is a `fault`: it is
 * sticky, nothing is processed any more, and the queue keeps what it saw for the error message.
 * What the caller did wrong is a negative errno and changes nothing.
 */
#ifndef VHOST_VIRTQUEUE_H
#define VHOST_VIRTQUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "chain.h"
#include "guest_memory.h"
#include "vring.h"

enum virtqueue_fault {
	VQ_OK,
	VQ_AVAIL_JUMP,	       /* avail.idx ran ahead by more than the ring has (2.7.6) */
	VQ_HEAD_RANGE,	       /* avail ring names a descriptor past the table */
	VQ_HEAD_BUSY,	       /* head made available again before it was used */
	VQ_NEXT_RANGE,	       /* desc.next past the table */
	VQ_CHAIN_TOO_LONG,     /* more descriptors than the ring has: a loop, or a lie */
	VQ_CHAIN_OPEN,	       /* packed: NEXT set, but the next slot is not available */
	VQ_ADDRESS,	       /* buffer not wholly in guest memory, or it wraps */
	VQ_LENGTH_ZERO,
	VQ_LENGTH_TOTAL,       /* chain of 2^32 bytes or more */
	VQ_TOO_MANY_PIECES,    /* buffers fall into more pieces of memory than we keep */
	VQ_WRITE_BEFORE_READ,  /* device-readable after device-writable (2.7.4.2) */
	VQ_INDIRECT_DISABLED,  /* INDIRECT without VIRTIO_F_INDIRECT_DESC */
	VQ_INDIRECT_NESTED,    /* split only: in packed tables the flag means nothing (2.8.7) */
	VQ_INDIRECT_NEXT,      /* INDIRECT together with NEXT (2.7.5.3.1) */
	VQ_INDIRECT_LENGTH,    /* table of 0 bytes or no multiple of 16 */
	VQ_ID_RANGE,	       /* packed: buffer id >= ring size; driver side: used id too */
	VQ_ID_BUSY,	       /* packed: buffer id of a chain that is still out */
	VQ_USED_ID,	       /* driver side: used element for nothing that is out */
	VQ_USED_JUMP,	       /* driver side: used.idx ran ahead of what is out */
	VQ_USED_BATCH,	       /* driver side, in_order: element for more chains than used.idx covers */
	VQ_LOG_ADDRESS,	       /* written to a page that the dirty log does not cover */
	/* Set by an engine or a device, never by the rings: a chain that is well-formed, but no request
	 * that its device could even answer. */
	VQ_REQUEST_HEADER,     /* fewer device-readable bytes than the request's header has */
	VQ_REQUEST_STATUS,     /* fewer device-writable bytes than the answer needs at least */
	VQ_ACCESS,	       /* set by who has the IOTLB: it will never have what was missed */
	/* No fault: the IOTLB lacks a mapping for the next chain, or for the ring itself. The queue looks
	 * empty, and nothing changed, until virtqueue_retry or virtqueue_map. `value` is the IOVA, `limit` the
	 * access that is lacking (IOTLB_READ, IOTLB_WRITE). */
	VQ_MISS,
	/* What the region of in-flight tracking says cannot be (inflight.h). */
	VQ_INFLIGHT_VERSION,
	VQ_INFLIGHT_SIZE,      /* for fewer entries than the ring has, or than was said */
	VQ_INFLIGHT_FLAG,      /* neither 0 nor 1 */
	VQ_INFLIGHT_INDEX,     /* of an entry, a head or a position that does not exist */
	VQ_INFLIGHT_LIST,      /* loops, misses entries, or ends elsewhere */
	VQ_INFLIGHT_BATCH,     /* the used index is further ahead than a batch can be */
	VQ_INFLIGHT_COUNT,     /* more in flight than was made available */
	VQ_INFLIGHT_CHAIN,     /* packed: saved descriptors that are no chain of that length */
	VQ_FAULTS
};

/* One line of English for each, without the values. */
const char *virtqueue_fault_text(enum virtqueue_fault fault);

struct virtqueue_fault_report {
	enum virtqueue_fault fault;
	uint16_t head;	/* chain it happened in: head index or buffer id, where known */
	uint64_t value; /* the offending number ... */
	uint64_t limit; /* ... and what it had to stay below (0: not a matter of size) */
};

struct iotlb;
struct ring_shadow;

/* Where the three areas are. Packed: avail is the driver's, used the device's event area. */
struct virtqueue_areas {
	void *desc, *avail, *used;
};

/* ------------------------------------------------------------------ device side */

struct virtqueue_config {
	struct virtqueue_areas areas; /* host pointers, translated and checked for alignment and overlap by the caller */
	struct guest_memory *mem;
	struct iotlb *iotlb; /* addresses are IOVAs; `mem` is its view then. NULL: they are guest addresses */
	uint32_t num;
	uint32_t base; /* of SET_VRING_BASE; packed: both indices and wraps, 0x80008000 when new */
	bool packed, indirect, event_idx, in_order;
	bool swapped; /* split only: a legacy driver of the other byte order (2.7.3) */
	void *inflight; /* the queue's region of in-flight tracking, aligned to 8; NULL: none */
	uint32_t inflight_num; /* entries of it, as the front-end says */
};

/* Per head (split) or buffer id (packed); small, for the cache's sake. */
struct vq_slot {
	uint32_t len;	/* writable bytes of the chain; once done, bytes written */
	uint16_t ndesc; /* ring slots; 0: not out */
	uint16_t seq;	/* of its pop, modulo VQ_SEQ_MASK + 1: tells unpop whether it is the newest; a
			 * caller who is wrong about that is caught, but for one case in 32768 */
};

struct virtqueue_log;

#define VQ_SEQ_MASK 0x7fffu
#define VQ_SLOT_DONE 0x8000u /* in seq: filled, waiting for its elders (in_order) */

struct virtqueue {
	struct guest_memory *mem;
	union {
		struct {
			struct vring_desc *desc;
			struct vring_avail *avail;
			struct vring_used *used;
		} split;
		struct {
			struct vring_packed_desc *desc;
			struct vring_packed_desc_event *driver, *device;
		} packed;
	};
	uint32_t num;
	bool is_packed, indirect, event_idx, in_order;
	bool swapped; /* the ring is in the other byte order */
	/* The owner's, from init on: the device only reads this queue, so that a buffer marked as writable breaks
	 * nothing, wherever it comes. (In indirect tables of packed rings, DPDK's virtio_user marks the header of
	 * each frame so, and of some frames one piece of data.) */
	bool read_only;
	/* Split: free-running 16-bit indices. Packed: positions, each with its wrap counter. */
	uint16_t last_avail;   /* next to pop */
	uint16_t shadow_avail; /* split: avail.idx as last read */
	uint16_t used;	       /* next to publish */
	uint16_t staged;       /* next to fill: `used` plus what flush() has not published */
	bool avail_wrap, used_wrap, staged_wrap;
	bool notify_off;       /* the driver was asked not to kick */
	bool signalled_valid;  /* false until the first decision: a predecessor may owe a signal */
	uint16_t first_flags;  /* packed: flags of the first staged element, written by flush */
	uint32_t inuse;	       /* ring slots popped and not yet published; never more than num */
	uint32_t staged_slots; /* of these, filled but not published */
	uint32_t unsignalled;  /* used entries (packed: slots) published since the last decision */
	uint32_t pops;	       /* seq of the next pop */
	struct vq_slot *slots; /* num */
	uint16_t *order;       /* in_order: circle of num ids, popped and not yet staged */
	uint32_t order_head, order_count;
	struct inflight *inflight; /* NULL: nobody tracks */
	struct virtqueue_fault_report report;
	struct iotlb *iotlb;	    /* NULL: there is no IOMMU */
	struct ring_shadow *shadow; /* there is one with an IOTLB */
	struct virtqueue_log *log; /* NULL: nothing is logged; see virtqueue_log.h */
};

/* 0, -EINVAL (num: split power of two <= 32768, packed 1..32768; base out of range; packed and swapped),
 * -ENOMEM. Split: the used index goes on from what used.idx holds. Asks the driver for kicks, whatever a
 * predecessor left in the ring; work that is there already comes without one.
 *
 * With an in-flight region that was used before, it and the ring say where to go on, not `base`, and what
 * was in flight is popped first, in its order. -EBADMSG: it cannot be, see vq->report. */
int virtqueue_init(struct virtqueue *vq, const struct virtqueue_config *cfg);
void virtqueue_destroy(struct virtqueue *vq);

/* Swap guest memory and the areas' host pointers, nothing else. Chains that are out stay out. */
void virtqueue_set_memory(struct virtqueue *vq, struct guest_memory *mem,
			  const struct virtqueue_areas *areas);

/*
 * Behind an IOMMU. The ring's own areas are no longer mapped: they are not touched from here on. What is
 * given back meanwhile is kept, and published when they are mapped again, perhaps elsewhere. `iova` and
 * `access` are for the report, VQ_MISS.
 */
void virtqueue_unmap(struct virtqueue *vq, uint64_t iova, uint32_t access);
void virtqueue_map(struct virtqueue *vq, const struct virtqueue_areas *areas);
bool virtqueue_is_mapped(const struct virtqueue *vq);

/* The IOTLB changed: what was missed before is tried again with the next pop. */
void virtqueue_retry(struct virtqueue *vq);

/* Up to n chains with one look at the index: how many, or -1. A fault behind the first chains is
 * reported by the next call, so that those before it are served. */
int virtqueue_pop_batch(struct virtqueue *vq, struct vhost_chain **c, unsigned n);

/* 1: *c is the next chain; 0: nothing available; -1: broken, see vq->report. */
static inline int virtqueue_pop(struct virtqueue *vq, struct vhost_chain *c)
{
	return virtqueue_pop_batch(vq, &c, 1);
}

/* Gives the most recently popped chain back: it will be popped again. -EINVAL if it is not that. */
int virtqueue_unpop(struct virtqueue *vq, const struct vhost_chain *c);

/* Stage a used element; nothing is visible before flush. -EINVAL: not out (pushed twice, or never
 * popped). -ERANGE: written > the chain's writable bytes. With in_order, an element whose elders are
 * still out waits for them. */
int virtqueue_fill(struct virtqueue *vq, uint16_t id, uint32_t written);

struct virtqueue_used {
	uint32_t id, written;
};

/* The same for n chains, in this order: how many were staged; fewer than n if what fill says of the next is
 * not 0. */
unsigned virtqueue_fill_batch(struct virtqueue *vq, const struct virtqueue_used *used, unsigned n);

/* Publish what is staged. */
void virtqueue_flush(struct virtqueue *vq);

/* virtqueue_fill, and virtqueue_flush if that succeeds. */
int virtqueue_push(struct virtqueue *vq, uint16_t id, uint32_t written);

/* Must the driver be signalled for what was published since the last call? */
bool virtqueue_should_notify(struct virtqueue *vq);

/* Ask the driver not to kick / to kick again. enable returns true if work came in meanwhile: the
 * caller must then look again, for no kick will come for it. */
void virtqueue_disable_notification(struct virtqueue *vq);
bool virtqueue_enable_notification(struct virtqueue *vq);

/* Is there something to pop? (A hint: checks nothing.) */
bool virtqueue_has_work(struct virtqueue *vq);

/* For GET_VRING_BASE: what a successor needs to go on after what was popped and published; chains that
 * are out are not in it, so drain first. Split: the next avail index. Packed: bits 0-14 the next avail
 * position, bit 15 its wrap counter, bits 16-30 and 31 the same of the used side. */
uint32_t virtqueue_base(const struct virtqueue *vq);

/* ------------------------------------------------------------------ driver side */

struct virtqueue_buf {
	uint64_t addr; /* guest address */
	uint32_t len;
};

struct driver_config {
	struct virtqueue_areas areas; /* host pointers, aligned as vring.h says; init writes all of them */
	uint32_t num;
	/* Where to start, for a device that is told the same by SET_VRING_BASE: split the next avail
	 * index, packed both positions, 0x80008000 when new. Nothing is out at that moment. */
	uint32_t base;
	bool packed, event_idx, in_order;
	/* Indirect tables, if wanted: num tables of indirect_max descriptors each. NULL: none. */
	struct vring_desc *indirect;
	uint64_t indirect_addr; /* its guest address */
	uint32_t indirect_max;
};

struct driver_slot { /* per descriptor (split) or buffer id (packed) */
	uint64_t token;
	uint32_t in_len;
	uint16_t ndesc; /* ring slots of the chain that starts here; 0: none is out */
	uint16_t next;	/* free list; split: the descriptor after this one in its chain, too */
	uint16_t last;	/* split: last descriptor of the chain, to give it back */
	uint16_t index; /* split: avail index at which it was published */
};

struct driver_queue {
	union {
		struct {
			struct vring_desc *desc;
			struct vring_avail *avail;
			struct vring_used *used;
		} split;
		struct {
			struct vring_packed_desc *desc;
			struct vring_packed_desc_event *driver, *device;
		} packed;
	};
	uint32_t num;
	bool is_packed, event_idx, in_order;
	struct vring_desc *indirect;
	uint64_t indirect_addr;
	uint32_t indirect_max; /* 0: no tables */
	/* All positions: split free-running 16 bits, packed position plus wrap counter. */
	uint16_t avail;	      /* next to publish */
	uint16_t last_used;   /* next used element to look at */
	uint16_t shadow_used; /* split: used.idx as last read */
	bool avail_wrap, used_wrap;
	bool cb_off;	   /* the device was asked not to call */
	bool event_armed;  /* event index says last_used, and was there before the last look */
	uint32_t added;	   /* since the last kick_prepare; split chains, packed slots */
	uint32_t num_free; /* descriptors */
	uint32_t claimed;  /* bytes that the device said it wrote into the chain of the last get_buf; of one
			    * that was skipped in order, what fits */
	uint16_t free_head;
	struct driver_slot *slots; /* num */
	/* in_order: the oldest chain out, and the batch the device just acknowledged */
	uint16_t oldest;
	uint16_t batch_last;
	uint32_t batch_len;
	bool batch_open;
	struct virtqueue_fault_report report;
};

/* 0, -EINVAL (num as for a device; base out of range, or packed with two positions that differ:
 * chains of somebody else's are out), -ENOMEM. Callbacks are enabled. */
int driver_queue_init(struct driver_queue *dq, const struct driver_config *cfg);
void driver_queue_destroy(struct driver_queue *dq);

/* The base to hand to a device now, and to a later driver_queue_init once nothing is out. */
uint32_t driver_queue_base(const struct driver_queue *dq);

/* The base to hand to a device that goes on after one that died with chains out, if it knows them from
 * the in-flight buffer: all that can be said here is what was used. */
uint32_t driver_queue_resume_base(const struct driver_queue *dq);

/* One chain of out device-readable, then in device-writable buffers. The chain's id (>= 0), -ENOSPC
 * (come back after get_buf), -EINVAL (no buffers, a length 0, an address that wraps, 2^32 bytes or more,
 * more buffers than the queue has), -EIO (broken). It is published at once; the token comes back from
 * get_buf. An indirect table is used when the chain has more than one buffer and fits into one. */
int virtqueue_add(struct driver_queue *dq, const struct virtqueue_buf *bufs, unsigned out, unsigned in,
		  uint64_t token);

struct virtqueue_request {
	const struct virtqueue_buf *bufs;
	unsigned out, in;
	uint64_t token;
};

/* Adds up to n chains and publishes them together: how many fitted, or what the first was refused with. */
int virtqueue_add_batch(struct driver_queue *dq, const struct virtqueue_request *reqs, unsigned n);

/* Must the device be kicked for what was published since the last call? */
bool virtqueue_kick_prepare(struct driver_queue *dq);

/* 1: a chain came back: its token and the bytes the device wrote (clipped to what it could write; all
 * of them for a chain that the device skipped in order, 2.7.9); 0: none; -1: broken, see dq->report.
 * After 0 with callbacks enabled, the device calls for the next one: the caller may sleep. */
int virtqueue_get_buf(struct driver_queue *dq, uint64_t *token, uint32_t *written);

/* Ask the device not to call / to call again; enable returns true if something came back meanwhile.
 * more_used is also true of a broken queue, so that nobody waits for one: get_buf says so. */
void virtqueue_disable_cb(struct driver_queue *dq);
bool virtqueue_enable_cb(struct driver_queue *dq);
bool virtqueue_more_used(struct driver_queue *dq);

#endif
