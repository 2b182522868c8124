// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The loop of the `ring` benchmark around a device of somebody else, which knows nothing of our headers.
 */
#include "ring_floor.h"

/* ns for `rounds` rounds, as ring_floor_run(): `serve` is called once a batch. */
uint64_t ring_foreign_run(struct ring_bench *r, void (*serve)(void *), void *device, uint32_t rounds,
			  uint32_t chains, uint32_t batch)
{
	uint64_t total = 0;

	while (rounds--) {
		uint64_t start;

		ring_refill(r, chains, batch);
		start = ring_clock();
		for (uint32_t b = 0; b < r->batches; b++) {
			ring_publish(r, b);
			serve(device);
		}
		total += ring_clock() - start;
	}
	return total;
}
