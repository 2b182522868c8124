/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Block queues served by an engine's workers: what is between a ring and the requests (blk_request.h).
 */
#ifndef VHOST_ENGINE_BLK_H
#define VHOST_ENGINE_BLK_H

#include "blk_request.h"
#include "engine.h"

#define BLK_PUBLISH_NS 20000u /* what is done this long is published before the batch ends */

struct blk_queue {
	struct engine_queue engine; /* first: its operations find the rest */
	const struct blk_disk *disk; /* the owner's, until the queue is detached */
	bool writethrough;
};

extern const struct engine_ops blk_engine_ops;

/*
 * Serves up to `budget` chains of a queue that is not attached in the calling thread, publishes
 * them and returns how many it took; -1: the queue broke, see vq->report. Notifying is the caller's.
 */
int blk_queue_drain(struct virtqueue *vq, const struct blk_disk *disk, bool writethrough,
		    unsigned budget);

#endif
