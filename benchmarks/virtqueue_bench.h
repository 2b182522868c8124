/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The shape of a device side in the `virtqueue` benchmark, whoever made it: where its ring is, and what it
 * is asked to do with 128 descriptors. Knows no ring library.
 *
 * A device exports NAME_new, NAME_delete, NAME_walk and NAME_push. The clock runs only while it does what
 * is measured: laying out the next round, and giving back what was popped, is outside.
 */
#ifndef BENCHMARKS_VIRTQUEUE_BENCH_H
#define BENCHMARKS_VIRTQUEUE_BENCH_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#define DESCRIPTORS 128u
#define WRITTEN 0x1000u /* what each used element says */

struct bench_memory {
	uint8_t *host;
	uint64_t guest, size;	    /* one region */
	uint64_t desc, avail, used; /* offsets in it */
	uint32_t num;
};

/* The driver: makes the next round available. */
struct bench_driver {
	void (*refill)(void *);
	void *driver;
};

static inline uint64_t bench_clock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
