/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A file that shrinks under its mapping: what the SIGBUS handler repairs, what it marks, and what
 * it leaves to whoever was there before. The cases that end a process run in a child.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "barrier.h"
#include "check.h"
#include "sigbus.h"

#define PAGES 16

static size_t page;

struct mapping {
	int fd, handle, broken;
	volatile uint8_t *p;
};

static void map(struct mapping *m)
{
	m->fd = memfd_create("test", MFD_CLOEXEC);
	CHECK(m->fd >= 0);
	CHECK_EQ(ftruncate(m->fd, (off_t)(PAGES * page)), 0);
	m->p = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	CHECK(m->p != MAP_FAILED);
	for (size_t i = 0; i < PAGES; i++)
		m->p[i * page] = 0x55;
	m->broken = 0;
	m->handle = sigbus_register((void *)m->p, PAGES * page, &m->broken);
	CHECK(m->handle >= 0);
}

static void unmap(struct mapping *m)
{
	sigbus_unregister(m->handle);
	munmap((void *)m->p, PAGES * page);
	close(m->fd);
}

static void cut(struct mapping *m, size_t pages)
{
	CHECK_EQ(ftruncate(m->fd, (off_t)(pages * page)), 0);
}

static void test_refuses(void)
{
	int broken;
	char *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK_EQ(sigbus_register(p, 0, &broken), -EINVAL);
	CHECK_EQ(sigbus_register(p + 8, 8, &broken), -EINVAL);
	CHECK_EQ(sigbus_register(NULL, page, &broken), -EINVAL);
	CHECK_EQ(sigbus_register(p, SIZE_MAX, &broken), -EINVAL);
	CHECK_EQ(sigbus_register(p, SIZE_MAX - (uintptr_t)p, &broken), -EINVAL);
	sigbus_unregister(-1);
	sigbus_unregister(1 << 20);
	munmap(p, page);
}

static void test_hole(void)
{
	struct mapping a, b;

	map(&a);
	map(&b);
	cut(&a, 4);
	CHECK_EQ(a.p[3 * page], 0x55);
	CHECK_EQ(LOAD_ACQUIRE(a.broken), 0); /* what is still there costs nothing */

	/* A read in the middle of the hole: zeros from there to the end, writable ones. */
	CHECK_EQ(a.p[10 * page], 0);
	CHECK_EQ(LOAD_ACQUIRE(a.broken), 1);
	a.p[15 * page + 5] = 7;
	CHECK_EQ(a.p[15 * page + 5], 7);
	CHECK_EQ(a.p[3 * page], 0x55);

	/* A write below it: the rest of the hole, without touching what was written since. */
	a.p[5 * page + 1] = 9;
	CHECK_EQ(a.p[5 * page + 1], 9);
	CHECK_EQ(a.p[9 * page], 0);
	CHECK_EQ(a.p[15 * page + 5], 7);
	CHECK_EQ(a.p[4 * page], 0);
	CHECK_EQ(a.p[3 * page], 0x55); /* still the file's */

	CHECK_EQ(LOAD_ACQUIRE(b.broken), 0);
	CHECK_EQ(b.p[15 * page], 0x55);
	unmap(&a);
	unmap(&b);
}

/* The last page of a length that ends inside it belongs to the range; the page behind does not. */
static void test_partial_page(void)
{
	struct mapping m;

	map(&m);
	sigbus_unregister(m.handle);
	m.handle = sigbus_register((void *)m.p, 3 * page + 1, &m.broken);
	cut(&m, 0);
	CHECK_EQ(m.p[4 * page - 1], 0);
	CHECK_EQ(m.p[0], 0);
	CHECK_EQ(m.broken, 1);
	unmap(&m);
}

static void test_table_grows_and_is_reused(void)
{
	enum { N = 1500 };
	static struct mapping m[N];
	int first;

	for (int i = 0; i < N; i++) {
		map(&m[i]);
		for (int k = i - 3; k < i; k++)
			CHECK(k < 0 || m[k].handle != m[i].handle);
	}
	for (int i = 0; i < N; i += 7) {
		cut(&m[i], 1);
		CHECK_EQ(m[i].p[page], 0);
	}
	for (int i = 0; i < N; i++)
		CHECK_EQ(m[i].broken, i % 7 == 0);
	first = m[0].handle;
	for (int i = 0; i < N; i++)
		unmap(&m[i]);
	/* A handle that was given back serves again, with nothing of its former owner's. */
	map(&m[0]);
	CHECK_EQ(m[0].handle, first);
	cut(&m[0], 2);
	m[0].p[2 * page] = 1;
	CHECK_EQ(m[0].p[15 * page], 0);
	CHECK_EQ(m[0].broken, 1);
	unmap(&m[0]);
}

/* Threads that register and give back all the time, while others fall into holes. */
static atomic_bool stop;

static void *churn(void *arg)
{
	(void)arg;
	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		struct mapping m;

		map(&m);
		unmap(&m);
	}
	return NULL;
}

static void *fall(void *arg)
{
	(void)arg;
	for (int i = 0; i < 300; i++) {
		struct mapping m;
		size_t keep = 1 + (size_t)i % (PAGES - 2);

		map(&m);
		cut(&m, keep);
		for (size_t k = PAGES - 1; k > keep; k--) {
			CHECK_EQ(m.p[k * page], 0);
			m.p[k * page] = (uint8_t)k;
		}
		for (size_t k = 0; k < PAGES; k++)
			CHECK_EQ(m.p[k * page], k < keep ? 0x55 : k == keep ? 0 : k);
		CHECK_EQ(LOAD_ACQUIRE(m.broken), 1);
		unmap(&m);
	}
	return NULL;
}

static void test_threads(void)
{
	pthread_t churners[2], fallers[2];

	atomic_store(&stop, false);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(pthread_create(&churners[i], NULL, churn, NULL), 0);
		CHECK_EQ(pthread_create(&fallers[i], NULL, fall, NULL), 0);
	}
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(fallers[i], NULL), 0);
	atomic_store(&stop, true);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(churners[i], NULL), 0);
}

/* Two threads on one hole at once: both get on. (TSan rightly calls it a race: one of them puts
 * pages where the other writes.) */
#ifndef __SANITIZE_THREAD__
static void *touch_all(void *arg)
{
	struct mapping *m = arg;

	for (size_t k = PAGES; k-- > 1;)
		m->p[k * page + 64] = 1;
	return NULL;
}

static void test_two_threads_one_hole(void)
{
	for (int i = 0; i < 200; i++) {
		struct mapping m;
		pthread_t t;

		map(&m);
		cut(&m, 1);
		CHECK_EQ(pthread_create(&t, NULL, touch_all, &m), 0);
		for (size_t k = PAGES; k-- > 1;)
			m.p[k * page] = 1;
		CHECK_EQ(pthread_join(t, NULL), 0);
		CHECK_EQ(m.p[0], 0x55);
		CHECK_EQ(LOAD_ACQUIRE(m.broken), 1);
		unmap(&m);
	}
}
#endif

/* ------------------------------------------------------ what is not ours */

static void in_child(void (*body)(void), int exit_code, int term_signal)
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		alarm(20); /* instead of hanging for good */
		body();
		_exit(77);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	if (term_signal) {
		CHECK(WIFSIGNALED(status));
		CHECK_EQ(WTERMSIG(status), term_signal);
	} else {
		CHECK(WIFEXITED(status));
		CHECK_EQ(WEXITSTATUS(status), exit_code);
	}
}

static void to_default(void)
{
	signal(SIGBUS, SIG_DFL); /* a sanitizer may have had one */
}

static void touch_foreign(void)
{
	struct mapping m, other;

	map(&m);
	map(&other);
	sigbus_unregister(m.handle);
	cut(&m, 1);
	m.p[page] = 1;
}

static void foreign_default(void)
{
	to_default();
	CHECK_EQ(sigbus_install(), 0);
	touch_foreign();
}

static void foreign_ignored(void)
{
	signal(SIGBUS, SIG_IGN);
	CHECK_EQ(sigbus_install(), 0);
	raise(SIGBUS); /* sent: ignored, as it was */
	touch_foreign();
}

static void sent_default(void)
{
	to_default();
	CHECK_EQ(sigbus_install(), 0);
	kill(getpid(), SIGBUS);
}

/* Sent with the address of a hole in it: still no fault. */
static void sent_with_address(void)
{
	union sigval v;
	struct mapping m;

	to_default();
	CHECK_EQ(sigbus_install(), 0);
	map(&m);
	v.sival_ptr = (void *)m.p;
	sigqueue(getpid(), SIGBUS, v);
}

static volatile uintptr_t fault_page;

static void theirs_info(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	_exit((uintptr_t)info->si_addr == fault_page ? 42 : 43);
}

static void foreign_handler_info(void)
{
	struct sigaction act = { .sa_sigaction = theirs_info, .sa_flags = SA_SIGINFO };
	struct mapping m;

	sigaction(SIGBUS, &act, NULL);
	CHECK_EQ(sigbus_install(), 0);
	CHECK_EQ(sigbus_install(), 0);
	map(&m);
	sigbus_unregister(m.handle);
	cut(&m, 1);
	fault_page = (uintptr_t)m.p + page;
	m.p[page] = 1;
}

static void theirs_plain(int sig)
{
	_exit(sig == SIGBUS ? 44 : 45);
}

static void foreign_handler_plain(void)
{
	signal(SIGBUS, theirs_plain);
	CHECK_EQ(sigbus_install(), 0);
	touch_foreign();
}

static void installed_over(void)
{
	struct sigaction now;

	to_default();
	CHECK_EQ(sigbus_install(), 0);
	signal(SIGBUS, theirs_plain);
	CHECK_EQ(sigbus_install(), -EBUSY);
	sigaction(SIGBUS, NULL, &now);
	CHECK(now.sa_handler == theirs_plain);
	/* Gone again, the way faulthandler.disable() does it: a new call puts ours back. */
	to_default();
	CHECK_EQ(sigbus_install(), 0);
	test_hole();
	_exit(46);
}

static void not_installed(void)
{
	struct mapping m;

	to_default();
	map(&m);
	cut(&m, 1);
	m.p[page] = 1;
}

static void test_foreign(void)
{
	in_child(not_installed, 0, SIGBUS);
	in_child(foreign_default, 0, SIGBUS);
	in_child(foreign_ignored, 0, SIGBUS);
	in_child(sent_default, 0, SIGBUS);
	in_child(sent_with_address, 0, SIGBUS);
	in_child(foreign_handler_info, 42, 0);
	in_child(foreign_handler_plain, 44, 0);
	in_child(installed_over, 46, 0);
}

static void test_errno_kept(void)
{
	struct mapping m;

	CHECK_EQ(sigbus_install(), 0);
	map(&m);
	cut(&m, 1);
	errno = 1234;
	m.p[page] = 1;
	CHECK_EQ(errno, 1234);
	unmap(&m);
}

int main(void)
{
	struct rlimit files;

	/* More mappings than an ordinary user may have files open by default. */
	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
	files.rlim_cur = files.rlim_max;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &files), 0);
	page = (size_t)sysconf(_SC_PAGESIZE);
	RUN(test_refuses);
	RUN(test_foreign); /* before this process has the handler itself */
	CHECK_EQ(sigbus_install(), 0);
	RUN(test_hole);
	RUN(test_errno_kept);
	RUN(test_partial_page);
	RUN(test_table_grows_and_is_reused);
	RUN(test_threads);
#ifndef __SANITIZE_THREAD__
	RUN(test_two_threads_one_hole);
#endif
	return 0;
}
