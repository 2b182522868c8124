// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * What the machine charges for the steps that nobody can leave out: a copy, a system call, a cache line
 * from the other core and back, a thread woken there. Knows no ring and no protocol.
 *
 * Each function gives the ns of `rounds` times the step, 0 if it failed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ------------------------------------------------------------------ one core */

/* Copies of `size` bytes from one place to the next of two pools of `pool` bytes. */
uint64_t limit_memcpy(uint32_t rounds, uint32_t size, uint32_t pool)
{
	uint8_t *from = malloc(pool), *to = malloc(pool);
	uint64_t start, total = 0;
	uint32_t at = 0;

	if (from && to) {
		memset(from, 1, pool);
		memset(to, 2, pool);
		start = now();
		for (uint32_t i = 0; i < rounds; i++) {
			memcpy(to + at, from + at, size);
			__asm__ volatile("" : : "r"(to) : "memory");
			at = at + 2 * size <= pool ? at + size : 0;
		}
		total = now() - start;
	}
	free(from);
	free(to);
	return total;
}

uint64_t limit_syscall(uint32_t rounds)
{
	uint64_t start = now();

	while (rounds--)
		syscall(SYS_getppid);
	return now() - start;
}

/* Random 4 KiB blocks, or what `size` is, of a file of `blocks` of them that is in the page cache. */
uint64_t limit_file(uint32_t rounds, int fd, uint32_t size, uint32_t blocks, bool write)
{
	uint8_t *buffer = aligned_alloc(4096, size);
	uint32_t random = 1;
	uint64_t start;

	if (!buffer)
		return 0;
	memset(buffer, 3, size);
	start = now();
	for (uint32_t i = 0; i < rounds; i++) {
		off_t at;
		ssize_t n;

		random = random * 1664525u + 1013904223u;
		at = (off_t)(random >> 8) % blocks * size;
		n = write ? pwrite(fd, buffer, size, at) : pread(fd, buffer, size, at);
		if (n != (ssize_t)size) {
			free(buffer);
			return 0;
		}
	}
	start = now() - start;
	free(buffer);
	return start;
}

/* ------------------------------------------------------------------ two cores */

/* Of the other core: answers `rounds` times and ends. */
struct other {
	_Alignas(128) uint32_t ping;
	_Alignas(128) uint32_t pong;
	_Alignas(128) uint32_t rounds;
	int core;
	int in, out; /* eventfds, or the same socket */
	size_t size; /* bytes of a message */
	bool failed;
};

static void *echo_line(void *argument)
{
	struct other *o = argument;

	for (uint32_t i = 1; i <= o->rounds; i++) {
		while (__atomic_load_n(&o->ping, __ATOMIC_ACQUIRE) != i)
			;
		__atomic_store_n(&o->pong, i, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void *echo_fd(void *argument)
{
	struct other *o = argument;
	char message[4096] = {0};

	for (uint32_t i = 0; i < o->rounds; i++) {
		if (read(o->in, message, o->size) != (ssize_t)o->size ||
		    write(o->out, message, o->size) != (ssize_t)o->size) {
			o->failed = true;
			break;
		}
	}
	return NULL;
}

static bool start_other(pthread_t *thread, struct other *o, void *(*work)(void *))
{
	pthread_attr_t attributes;
	cpu_set_t set;
	bool ok;

	CPU_ZERO(&set);
	CPU_SET((unsigned)o->core, &set);
	pthread_attr_init(&attributes);
	pthread_attr_setaffinity_np(&attributes, sizeof(set), &set);
	ok = !pthread_create(thread, &attributes, work, o);
	pthread_attr_destroy(&attributes);
	return ok;
}

enum { WARM = 16 }; /* rounds that are not timed: the other thread is up, the caches are warm */

/* A cache line to a thread that spins on the other core, and another one back. */
uint64_t limit_line(uint32_t rounds, int core)
{
	struct other o = {.rounds = rounds + WARM, .core = core};
	pthread_t thread;
	uint64_t start = 0;

	if (!start_other(&thread, &o, echo_line))
		return 0;
	for (uint32_t i = 1; i <= rounds + WARM; i++) {
		if (i == WARM + 1)
			start = now();
		__atomic_store_n(&o.ping, i, __ATOMIC_RELEASE);
		while (__atomic_load_n(&o.pong, __ATOMIC_ACQUIRE) != i)
			;
	}
	start = now() - start;
	pthread_join(thread, NULL);
	return start;
}

/* Something written to a thread that sleeps in read(), and its answer: both are woken each time. */
static uint64_t ping_pong(struct other *o, int in, int out, uint32_t rounds)
{
	char message[4096] = {1};
	pthread_t thread;
	uint64_t start = 0;
	bool ok = true;

	if (!start_other(&thread, o, echo_fd))
		return 0;
	for (uint32_t i = 0; ok && i < rounds + WARM; i++) {
		if (i == WARM)
			start = now();
		ok = write(out, message, o->size) == (ssize_t)o->size &&
		     read(in, message, o->size) == (ssize_t)o->size;
	}
	start = now() - start;
	if (!ok)
		pthread_cancel(thread);
	pthread_join(thread, NULL);
	return ok && !o->failed ? start : 0;
}

uint64_t limit_eventfd(uint32_t rounds, int core)
{
	struct other o = {.rounds = rounds + WARM, .core = core, .size = 8};
	int there = eventfd(0, EFD_CLOEXEC), back = eventfd(0, EFD_CLOEXEC);
	uint64_t total = 0;

	o.in = there;
	o.out = back;
	if (there >= 0 && back >= 0)
		total = ping_pong(&o, back, there, rounds);
	close(there);
	close(back);
	return total;
}

uint64_t limit_socket(uint32_t rounds, int core, uint32_t size)
{
	struct other o = {.rounds = rounds + WARM, .core = core, .size = size};
	uint64_t total = 0;
	int pair[2];

	if (size > 4096 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return 0;
	o.in = o.out = pair[1];
	total = ping_pong(&o, pair[0], pair[0], rounds);
	close(pair[0]);
	close(pair[1]);
	return total;
}
