/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Memory ordering on memory that another process writes.
 *
 * Every access to a ring index or flag goes through one of these, so that the compiler reads or
 * writes it exactly once; each use names its pair. Knows nothing about rings.
 */
#ifndef VHOST_BARRIER_H
#define VHOST_BARRIER_H

#define READ_ONCE(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define WRITE_ONCE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
#define LOAD_ACQUIRE(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE_RELEASE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)

/* Orders earlier stores before later loads, which acquire and release do not. */
#define FULL_BARRIER() __atomic_thread_fence(__ATOMIC_SEQ_CST)

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#if defined(__x86_64__) || defined(__i386__)
#define cpu_relax() __builtin_ia32_pause()
#else
#define cpu_relax() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#endif

#endif
