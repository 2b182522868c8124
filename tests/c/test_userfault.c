/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Pages that come later, that never come, and whoever should have brought them going away. Both sides in
 * one process: what the front-end maps is a second mapping of the same file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "barrier.h"
#include "check.h"
#include "sigbus.h"
#include "userfault.h"
#include "userfault_uapi.h"

#define PAGES 8

static size_t page;

struct memory {
	struct userfault u;
	int fd, sigbus, broken;
	uint8_t *map;
};

/* One access by a thread of its own: with the processor, or by the kernel on its behalf. */
struct access {
	pthread_t thread;
	uint8_t *at;
	int file; /* -1: no system call */
	int result;
};

static void *run(void *opaque)
{
	struct access *a = opaque;

	if (a->file < 0)
		a->result = READ_ONCE(*a->at);
	else
		a->result = pwrite(a->file, a->at, 1, 0) < 0 ? -errno : 1;
	return NULL;
}

static void start(struct access *a, uint8_t *at, int file)
{
	a->at = at;
	a->file = file;
	CHECK_EQ(pthread_create(&a->thread, NULL, run, a), 0);
}

static int finish(struct access *a)
{
	CHECK_EQ(pthread_join(a->thread, NULL), 0);
	return a->result;
}

static void setup(struct memory *m)
{
	m->fd = memfd_create("guest", MFD_CLOEXEC);
	CHECK(m->fd >= 0);
	CHECK_EQ(ftruncate(m->fd, (off_t)(PAGES * page)), 0);
	m->map = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	CHECK(m->map != MAP_FAILED);
	m->broken = 0;
	m->sigbus = sigbus_register(m->map, PAGES * page, &m->broken);
	CHECK(m->sigbus >= 0);
	CHECK_EQ(userfault_open(&m->u), 0);
	CHECK_EQ(userfault_register(&m->u, m->map, PAGES * page), 0);
}

static void unmap(struct memory *m)
{
	sigbus_unregister(m->sigbus);
	munmap(m->map, PAGES * page);
	close(m->fd);
}

static void teardown(struct memory *m)
{
	userfault_close(&m->u);
	unmap(m);
}

/* The next fault that is reported: its address. */
static uint64_t next_fault(struct memory *m)
{
	struct pollfd p = { .fd = m->u.fd, .events = POLLIN };
	struct uffd_msg message;

	CHECK_EQ(poll(&p, 1, 20000), 1);
	CHECK_EQ(read(m->u.fd, &message, sizeof(message)), (ssize_t)sizeof(message));
	CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
	return message.arg.pagefault.address;
}

static void test_a_page_comes(void)
{
	struct memory m;
	struct userfault front;
	struct access by_cpu, by_kernel;
	uint8_t *alias, *data;
	int file = memfd_create("disk", MFD_CLOEXEC);

	setup(&m);
	CHECK_EQ(userfault_open(&front), 0);
	alias = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
	CHECK_EQ(userfault_register(&front, alias, PAGES * page), 0);
	data = malloc(page);
	memset(data, 0x5a, page);

	start(&by_cpu, m.map + 3 * page + 7, -1);
	CHECK_EQ(next_fault(&m), (uintptr_t)m.map + 3 * page);
	start(&by_kernel, m.map + 3 * page + 9, file);
	CHECK_EQ(next_fault(&m), (uintptr_t)m.map + 3 * page);
	CHECK_EQ(userfault_copy(front.fd, (uintptr_t)alias + 3 * page, data, page), 0);
	CHECK_EQ(userfault_wake(m.u.fd, (uintptr_t)m.map + 3 * page, page), 0);
	CHECK_EQ(finish(&by_cpu), 0x5a);
	CHECK_EQ(finish(&by_kernel), 1);
	CHECK_EQ(userfault_copy(front.fd, (uintptr_t)alias + 3 * page, data, page), -EEXIST);

	/* Nobody waits for a page that is there. */
	CHECK_EQ(userfault_copy(front.fd, (uintptr_t)alias + 4 * page, data, page), 0);
	CHECK_EQ(READ_ONCE(m.map[4 * page]), 0x5a);
	CHECK_EQ(m.broken, 0);

	userfault_close(&front);
	munmap(alias, PAGES * page);
	free(data);
	close(file);
	teardown(&m);
}

static void test_the_end(void)
{
	struct memory m;
	struct access waiting;

	setup(&m);
	start(&waiting, m.map + page, -1);
	next_fault(&m);
	CHECK_EQ(userfault_end(&m.u), 0);
	CHECK_EQ(finish(&waiting), 0);
	CHECK_EQ(READ_ONCE(m.map[2 * page]), 0);
	CHECK_EQ(m.broken, 0);
	/* And all over again. */
	CHECK_EQ(userfault_register(&m.u, m.map, PAGES * page), 0);
	start(&waiting, m.map + 3 * page, -1);
	next_fault(&m);
	userfault_close(&m.u);
	CHECK_EQ(finish(&waiting), 0);
	unmap(&m);
}

static void nobody_will_come(struct memory *m, void (*end)(struct memory *))
{
	struct access waiting;

	start(&waiting, m->map + 2 * page, -1);
	next_fault(m);
	end(m);
	CHECK_EQ(finish(&waiting), 0);
	CHECK_EQ(LOAD_ACQUIRE(m->broken), 1);
}

static void abandon(struct memory *m)
{
	userfault_abandon(&m->u);
}

static void test_abandoned(void)
{
	struct memory m;

	setup(&m);
	nobody_will_come(&m, abandon);
	userfault_abandon(&m.u); /* once more is nothing */
	CHECK_EQ(userfault_register(&m.u, m.map, page), -EPIPE);
	teardown(&m);
}

static void test_no_zeros_are_taken_for_data(void)
{
	struct memory m;
	struct access by_kernel;
	int file = memfd_create("disk", MFD_CLOEXEC);

	setup(&m);
	start(&by_kernel, m.map + 6 * page, file);
	next_fault(&m);
	userfault_abandon(&m.u);
	CHECK_EQ(finish(&by_kernel), -EFAULT);
	CHECK_EQ(lseek(file, 0, SEEK_END), 0);
	teardown(&m);
	close(file);
}

static int ends[2];

static void hang_up(struct memory *m)
{
	(void)m;
	close(ends[1]);
}

static void test_the_guard(void)
{
	struct memory m;

	setup(&m);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_EQ(userfault_guard(&m.u, ends[0]), 0);
	CHECK_EQ(userfault_guard(&m.u, ends[0]), -EALREADY);
	close(ends[0]); /* its own copy is enough */
	nobody_will_come(&m, hang_up);
	teardown(&m);
}

static void test_the_guard_that_saw_nothing(void)
{
	struct memory m;

	setup(&m);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_EQ(userfault_guard(&m.u, ends[0]), 0);
	/* Bytes that arrive are no end. */
	CHECK_EQ(write(ends[1], "x", 1), 1);
	teardown(&m);
	CHECK_EQ(m.broken, 0);
	close(ends[0]);
	close(ends[1]);
}

/* A program that forks lets go of everything in the child: of its own copy, not of the parent's memory. */
static void test_a_fork_that_lets_go(void)
{
	struct memory m;
	struct access a;
	pid_t child;
	int status;

	setup(&m);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_EQ(userfault_guard(&m.u, ends[0]), 0);
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		alarm(20); /* the guard is no thread of the child, to wait for */
		userfault_close(&m.u);
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	start(&a, m.map + page, -1);
	CHECK_EQ(next_fault(&m), (uintptr_t)m.map + page);
	CHECK_EQ(userfault_end(&m.u), 0);
	CHECK_EQ(finish(&a), 0);
	teardown(&m);
	close(ends[0]);
	close(ends[1]);
}

static void test_memory_that_no_page_can_come_to(void)
{
	struct memory m;
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	void *map = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);

	setup(&m);
	CHECK_EQ(userfault_register(&m.u, map, page), -EINVAL);
	CHECK_EQ(userfault_register(&m.u, m.map + 1, page), -EINVAL);
	CHECK_EQ(m.u.count, 1);
	teardown(&m);
	munmap(map, page);
	close(fd);
}

int main(void)
{
	struct userfault u;
	int rc = userfault_open(&u);

	if (rc == -EPERM || rc == -ENOSYS) {
		printf("userfaultfd is not for us here (%s): nothing tested\n", strerror(-rc));
		return 0;
	}
	CHECK_EQ(rc, 0);
	userfault_close(&u);
	page = (size_t)sysconf(_SC_PAGESIZE);
	CHECK_EQ(sigbus_install(), 0);

	RUN(test_a_page_comes);
	RUN(test_the_end);
	RUN(test_no_zeros_are_taken_for_data);
	RUN(test_abandoned);
	RUN(test_the_guard);
	RUN(test_the_guard_that_saw_nothing);
	RUN(test_a_fork_that_lets_go);
	RUN(test_memory_that_no_page_can_come_to);
	return 0;
}
