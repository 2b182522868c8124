/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Included before libblkio's own example blkio-bench.c. It has no option for the queue size: with
 * the default of 256 and three descriptors a request it cannot go beyond depth 85. And it runs for
 * whole seconds, where a test needs some thousand requests: tenths of seconds here.
 */
#include <blkio.h>
#include <stdlib.h>
#include <unistd.h>

static inline int blkio_start_with_queue_size(struct blkio *b)
{
	const char *size = getenv("BLKIO_QUEUE_SIZE");
	int ret = size ? blkio_set_int(b, "queue-size", atoi(size)) : 0;

	return ret ? ret : blkio_start(b);
}
#define blkio_start blkio_start_with_queue_size
#define sleep(tenths) usleep((tenths) * 100000)
