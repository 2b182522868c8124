// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The driver of the `virtqueue` benchmark: a split ring with 128 descriptors, as one chain or as 128, in the
 * table or in indirect ones. Knows the wire format, no device.
 */
#include <stdlib.h>
#include <string.h>

#include "virtqueue_bench.h"
#include "vring.h"

#define INDIRECT_AT 0x10000u /* tables, each with room for 128 descriptors */
#define TABLE (DESCRIPTORS * 16u)
#define BUFFERS_AT 0x100000u
#define BUFFER 0x1000u

struct driver {
	const struct bench_memory *mem;
	uint32_t chains, length;
	bool indirect;
	uint16_t avail_idx;
};

static void descriptor(struct vring_desc *desc, const struct bench_memory *mem, uint32_t n, bool last, uint16_t next)
{
	*desc = (struct vring_desc){mem->guest + BUFFERS_AT + (uint64_t)n * BUFFER, BUFFER,
				    (uint16_t)(VRING_DESC_F_WRITE | (last ? 0 : VRING_DESC_F_NEXT)),
				    last ? 0 : next};
}

/* Lays out `chains` chains of `length` descriptors once; they stay, and are made available round by round. */
struct driver *driver_new(const struct bench_memory *mem, uint32_t chains, uint32_t length, bool indirect)
{
	struct vring_desc *table = (struct vring_desc *)(mem->host + mem->desc);
	struct driver *d = calloc(1, sizeof(*d));

	if (!d)
		return NULL;
	*d = (struct driver){.mem = mem, .chains = chains, .length = length, .indirect = indirect};
	memset(mem->host, 0, INDIRECT_AT);
	for (uint32_t c = 0; c < chains; c++) {
		uint64_t at = INDIRECT_AT + (uint64_t)c * TABLE;
		struct vring_desc *inner = (struct vring_desc *)(mem->host + at);

		if (indirect)
			table[c] = (struct vring_desc){mem->guest + at, length * 16, VRING_DESC_F_INDIRECT, 0};
		for (uint32_t i = 0; i < length; i++) {
			uint32_t n = c * length + i;

			if (indirect)
				descriptor(&inner[i], mem, n, i + 1 == length, (uint16_t)(i + 1));
			else
				descriptor(&table[n], mem, n, i + 1 == length, (uint16_t)(n + 1));
		}
	}
	return d;
}

void driver_delete(struct driver *d)
{
	free(d);
}

static uint16_t head(const struct driver *d, uint32_t chain)
{
	return (uint16_t)(d->indirect ? chain : chain * d->length);
}

void driver_refill(void *driver)
{
	struct driver *d = driver;
	struct vring_avail *avail = (struct vring_avail *)(d->mem->host + d->mem->avail);

	for (uint32_t c = 0; c < d->chains; c++)
		avail->ring[d->avail_idx++ % d->mem->num] = head(d, c);
	__atomic_store_n(&avail->idx, d->avail_idx, __ATOMIC_RELEASE);
}

/* How many chains of the last round came back as they must. */
uint32_t driver_check(const struct driver *d)
{
	const struct vring_used *used = (const struct vring_used *)(d->mem->host + d->mem->used);
	uint32_t good = 0;

	for (uint32_t c = 0; c < d->chains; c++) {
		uint16_t at = (uint16_t)(d->avail_idx - d->chains + c);
		const struct vring_used_elem *e = &used->ring[at % d->mem->num];

		good += e->id == head(d, c) && e->len == WRITTEN;
	}
	return used->idx == d->avail_idx ? good : 0;
}
