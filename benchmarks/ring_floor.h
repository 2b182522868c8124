/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * One ring of the benchmark: a driver that lays out blk-shaped chains ahead of time, so that
 * publishing a batch is one 16-bit store, and a device that trusts everything (the floor).
 */
#ifndef BENCHMARKS_RING_FLOOR_H
#define BENCHMARKS_RING_FLOOR_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "guest_memory.h"
#include "vring.h"

#define RING_HEADER 16u
#define RING_DATA 4096u
#define RING_WRITTEN (RING_DATA + 1)
#define RING_CHAIN 3u /* descriptors */
#define RING_CHAIN_BYTES 32u /* header, status, padding: one chain's place in region 0 */
#define RING_STATUS_UNSET 0xff

struct ring_bench {
	bool packed;
	uint32_t num;
	uint8_t *desc, *avail, *used;
	/* Regions: all of one size, a power of two, side by side from guest_base. */
	uint64_t guest_base;
	uint32_t shift, nregions;
	struct guest_region *regions;
	/* Where headers and status bytes lie, and the pool of data addresses to walk through. */
	uint64_t small;
	const uint64_t *data;
	uint32_t ndata, next_data;
	/* Driver. */
	uint32_t chains, next_chain; /* a round; where the next one starts (split) */
	uint32_t start;		     /* ring position the round started at */
	bool start_wrap;
	uint16_t avail_idx; /* split: free running; packed: position */
	bool avail_wrap;
	uint32_t batches;
	uint32_t *publish_at; /* index of a 16-bit word in the avail (split) or descriptor area */
	uint16_t *publish;
	/* The floor's device. */
	uint16_t last_avail, used_idx;
	bool wrap;
	uint64_t notified;
	void *engine; /* of ring_engine.c */
};

static inline uint16_t *ring_words(struct ring_bench *r)
{
	return (uint16_t *)(r->packed ? r->desc : r->avail);
}

static inline void ring_publish(struct ring_bench *r, uint32_t batch)
{
	__atomic_store_n(&ring_words(r)[r->publish_at[batch]], r->publish[batch], __ATOMIC_RELEASE);
}

/* What a device would do with a chain: the compiler must have made every byte of the list. */
static inline void ring_consume(const void *p)
{
	__asm__ volatile("" : : "r"(p) : "memory");
}

static inline uint64_t ring_clock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void ring_refill(struct ring_bench *r, uint32_t chains, uint32_t batch);

/* Serves what is published, until there is nothing. */
typedef void ring_device(void *device);

uint64_t ring_run(struct ring_bench *r, ring_device *serve, void *device, uint32_t rounds, uint32_t chains,
		  uint32_t batch);

#endif
