/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The device's side of a split virtqueue whose driver has the other byte order: device_split.c once
 * more, with accessors that swap and under names of its own, so that rings in this machine's order pay
 * nothing for it.
 */
#define RING_SWAPPED

#define split_init swapped_init
#define split_set_areas swapped_set_areas
#define split_pop_batch swapped_pop_batch
#define split_unpop swapped_unpop
#define split_fill swapped_fill
#define split_fill_batch swapped_fill_batch
#define split_flush swapped_flush
#define split_push swapped_push
#define split_should_notify swapped_should_notify
#define split_disable_notification swapped_disable_notification
#define split_enable_notification swapped_enable_notification
#define split_has_work swapped_has_work
#define split_base swapped_base

#include "device_split.c"
