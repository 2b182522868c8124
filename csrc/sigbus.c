/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The table of ranges and the SIGBUS handler; see sigbus.h.
 *
 * The handler runs at any instruction of any thread, so it takes no lock, allocates nothing, and
 * reads entries that another thread may be changing. Chunks of entries are appended and never freed
 * (a handler may be walking them); each entry is a small seqlock. The handler never waits for a
 * writer: an entry that is being changed belongs to a range that nobody touches yet or any more, so
 * it cannot be the one that faulted.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "barrier.h"
#include "sigbus.h"

#define CHUNK_ENTRIES 512u

struct sigbus_entry {
	uint32_t seq;	/* odd while the rest changes */
	uintptr_t base; /* 0: free */
	uintptr_t end;	/* rounded up to a page */
	uintptr_t hole; /* zero pages lie from here on; `end` as long as there are none */
	int *broken;
};

struct sigbus_chunk {
	struct sigbus_chunk *next;
	struct sigbus_entry entries[CHUNK_ENTRIES];
};

static struct sigbus_chunk first_chunk;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER; /* writers only */
static uintptr_t page_size;
static struct sigaction previous;
static bool installed;
static int repairs;

/* -------------------------------------------------------------- the table */

static void entry_set(struct sigbus_entry *e, uintptr_t base, uintptr_t end, int *broken)
{
	/* Sequentially consistent all through: this is rare, and its pair is the same in
	 * entry_get(). */
	__atomic_add_fetch(&e->seq, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&e->base, base, __ATOMIC_SEQ_CST);
	__atomic_store_n(&e->end, end, __ATOMIC_SEQ_CST);
	__atomic_store_n(&e->hole, end, __ATOMIC_SEQ_CST);
	__atomic_store_n(&e->broken, broken, __ATOMIC_SEQ_CST);
	__atomic_add_fetch(&e->seq, 1, __ATOMIC_SEQ_CST);
}

/* A consistent copy, or false. Pairs with entry_set(). */
static bool entry_get(struct sigbus_entry *e, struct sigbus_entry *copy)
{
	uint32_t seq = __atomic_load_n(&e->seq, __ATOMIC_SEQ_CST);

	copy->base = __atomic_load_n(&e->base, __ATOMIC_SEQ_CST);
	copy->end = __atomic_load_n(&e->end, __ATOMIC_SEQ_CST);
	copy->hole = __atomic_load_n(&e->hole, __ATOMIC_SEQ_CST);
	copy->broken = __atomic_load_n(&e->broken, __ATOMIC_SEQ_CST);
	return !(seq & 1) && seq == __atomic_load_n(&e->seq, __ATOMIC_SEQ_CST);
}

int sigbus_register(void *base, size_t len, int *broken)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t start = (uintptr_t)base;
	uintptr_t end = (start + len + page - 1) & ~(page - 1);
	struct sigbus_chunk *chunk = &first_chunk, *next;
	int handle = 0;

	if (!start || start % page || !len || start + len < start || end < start)
		return -EINVAL;

	pthread_mutex_lock(&table_lock);
	for (;;) {
		for (unsigned i = 0; i < CHUNK_ENTRIES; i++, handle++) {
			if (chunk->entries[i].base)
				continue;
			entry_set(&chunk->entries[i], start, end, broken);
			pthread_mutex_unlock(&table_lock);
			return handle;
		}
		next = chunk->next;
		if (!next) {
			next = calloc(1, sizeof(*next));
			if (!next)
				break;
			/* Publishes the zeroed chunk; pairs with the acquire in find(). */
			STORE_RELEASE(chunk->next, next);
		}
		chunk = next;
	}
	pthread_mutex_unlock(&table_lock);
	return -ENOMEM;
}

void sigbus_unregister(int handle)
{
	struct sigbus_chunk *chunk = &first_chunk;

	if (handle < 0)
		return;
	pthread_mutex_lock(&table_lock);
	while (chunk && (unsigned)handle >= CHUNK_ENTRIES) {
		chunk = chunk->next;
		handle -= (int)CHUNK_ENTRIES;
	}
	if (chunk)
		entry_set(&chunk->entries[handle], 0, 0, NULL);
	pthread_mutex_unlock(&table_lock);
}

/* ------------------------------------------------------------ the handler */

static struct sigbus_entry *find(uintptr_t addr, struct sigbus_entry *copy)
{
	struct sigbus_chunk *chunk = &first_chunk;

	/* Acquire pairs with the release in sigbus_register(). */
	for (; chunk; chunk = LOAD_ACQUIRE(chunk->next)) {
		for (unsigned i = 0; i < CHUNK_ENTRIES; i++) {
			struct sigbus_entry *e = &chunk->entries[i];

			if (entry_get(e, copy) && copy->base && addr >= copy->base &&
			    addr < copy->end)
				return e;
		}
	}
	return NULL;
}

/*
 * mmap over pages that other threads are copying to and from, on purpose: what they copy is lost, and
 * `broken`, whose order TSan does check, says so.
 */
static void *map_over(void *addr, size_t len)
{
	void *got;

#ifdef __SANITIZE_THREAD__
	void AnnotateIgnoreWritesBegin(const char *, int), AnnotateIgnoreWritesEnd(const char *, int);

	AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
	got = mmap(addr, len, PROT_READ | PROT_WRITE,
		   MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE | MAP_NORESERVE, -1, 0);
#ifdef __SANITIZE_THREAD__
	AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
	return got;
}

/*
 * Zero pages from the page of `addr` to `end`; where they start, or 0. Where the mapping is of huge
 * pages the kernel refuses (EINVAL) to replace a part of one, so the bounds widen to its size; such
 * a mapping always ends on that bound, so nothing of anybody else's is hit.
 */
static uintptr_t cover(const struct sigbus_entry *e, uintptr_t addr, uintptr_t end)
{
	const uintptr_t sizes[] = { page_size, (uintptr_t)2 << 20, (uintptr_t)1 << 30 };

	for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		uintptr_t mask = sizes[i] - 1;
		uintptr_t from = addr & ~mask, to = (end + mask) & ~mask;

		if (e->base & mask)
			return 0;
		if (map_over((void *)from, to - from) != MAP_FAILED)
			return from;
		if (errno != EINVAL)
			return 0;
	}
	return 0;
}

static bool repair(uintptr_t addr)
{
	struct sigbus_entry copy, *e = find(addr, &copy);
	uintptr_t from;

	if (!e)
		return false;
	/* Before the zero pages, so that a thread that has used zeros of ours and then looks finds
	 * 1. Release pairs with the acquire of whoever owns the flag. */
	STORE_RELEASE(*copy.broken, 1);
	/* Pairs with the acquire of whoever watches the count: the flag is there. */
	__atomic_add_fetch(&repairs, 1, __ATOMIC_RELEASE);
	/* Leave alone what an earlier fault already covered: it may hold data written since. (A
	 * fault past `hole` means that a zero page itself failed, a bad memory module: cover
	 * again.) Two threads that get here at once may still cover one page twice; the range is
	 * lost anyway. */
	from = cover(&copy, addr, addr < copy.hole ? copy.hole : copy.end);
	if (!from)
		return false;
	if (from < copy.hole)
		__atomic_store_n(&e->hole, from, __ATOMIC_SEQ_CST);
	return true;
}

static void pass_on(int sig, siginfo_t *info, void *context)
{
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	bool sent = info->si_code <= 0; /* by kill() and its kin: it will not happen again */

	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(sig, info, context);
		return;
	}
	if (previous.sa_handler == SIG_IGN && sent)
		return;
	if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
		previous.sa_handler(sig);
		return;
	}
	/* The default action. The access faults again on return, or the raised signal is delivered
	 * then, since SIGBUS is blocked until this handler returns. (The kernel does not let a
	 * process ignore a fault either.) */
	sigaction(sig, &dfl, NULL);
	if (sent)
		raise(sig);
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	int saved = errno;

	/* si_addr means something only when the kernel reports an access. */
	if (info->si_code <= 0 || !repair((uintptr_t)info->si_addr))
		pass_on(sig, info, context);
	errno = saved;
}

int sigbus_install(void)
{
	/* SA_ONSTACK: a thread of a runtime with small stacks brings its own. No SA_NODEFER: a
	 * fault in here is a bug of ours, and the kernel ends the process for it. */
	struct sigaction act = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction now;
	int rc = 0;

	sigemptyset(&act.sa_mask);
	pthread_mutex_lock(&table_lock);
	page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
	if (sigaction(SIGBUS, NULL, &now)) {
		rc = -errno;
	} else if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) {
		rc = 0;
	} else if (installed && ((now.sa_flags & SA_SIGINFO) || (now.sa_handler != SIG_DFL &&
								  now.sa_handler != SIG_IGN))) {
		rc = -EBUSY; /* it may call ours: taking it as our previous one could make a ring */
	} else {
		previous = now; /* before ours can run; sigaction is the barrier */
		if (sigaction(SIGBUS, &act, NULL))
			rc = -errno;
		else
			installed = true;
	}
	pthread_mutex_unlock(&table_lock);
	return rc;
}

bool sigbus_installed(void)
{
	bool is;

	pthread_mutex_lock(&table_lock);
	is = installed;
	pthread_mutex_unlock(&table_lock);
	return is;
}

const int *sigbus_repairs(void)
{
	return &repairs;
}
