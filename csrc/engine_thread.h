/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* A thread of ours in somebody else's program. */
#ifndef VHOST_ENGINE_THREAD_H
#define VHOST_ENGINE_THREAD_H

#include <pthread.h>

/* 0 or a positive errno. `name`: at most 15 bytes are shown. */
int engine_thread_start(pthread_t *thread, const pthread_attr_t *attr, const char *name,
			void *(*main)(void *), void *arg);

#endif
