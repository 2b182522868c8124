/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Memory that is not there yet: whoever touches a page of it waits in the kernel until somebody else, who
 * has the same userfaultfd, says that the page came. Knows address ranges and the kernel's interface;
 * knows neither messages nor regions.
 *
 * Who waits may be any thread, also the only one that would notice that nobody will ever bring the page.
 * So a small thread of its own, the guard, watches the connection to whoever brings it, and abandons the
 * memory when that ends.
 */
#ifndef VHOST_USERFAULT_H
#define VHOST_USERFAULT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct userfault_range {
	void *addr;
	size_t len;
};

struct userfault {
	int fd;
	pid_t pid; /* of the process whose memory it is: a fork has the descriptor, too */
	pthread_mutex_t lock; /* of the next four */
	struct userfault_range *ranges;
	size_t count;
	size_t room;
	bool abandoned;
	int empty; /* a file of no bytes, which takes the place of abandoned memory */
	bool guarded;
	pthread_t guard;
	int peer; /* what the guard watches */
	int stop; /* an eventfd: the guard's end */
};

/*
 * 0 or a negative errno: -EPERM where the kernel lets only the privileged do it, -EOPNOTSUPP where it
 * knows none for shared memory. Nothing is open after an error.
 */
int userfault_open(struct userfault *u);

/* Ends the guard, and closes everything; registered memory becomes ordinary, whoever waits goes on. */
void userfault_close(struct userfault *u);

/*
 * From now on whoever touches a page of [addr, addr + len) that its file has not got waits. The mapping is
 * of shared memory, page aligned, and outlives the registration. -EPIPE if the memory was abandoned.
 */
int userfault_register(struct userfault *u, void *addr, size_t len);

/* Registered memory becomes ordinary: what is not there now is zero. Whoever waits goes on. */
int userfault_end(struct userfault *u);

/*
 * The pages that are not there will never come: from now on touching registered memory is a bus error
 * (see sigbus.h), and EFAULT in system calls, never zeros that somebody could take for data. Whoever waits
 * goes on with that. From any thread.
 */
void userfault_abandon(struct userfault *u);

/* Abandon the memory when the other end of the socket `peer` is closed. The socket stays the caller's. */
int userfault_guard(struct userfault *u, int peer);

/* ------------------------------------------------ the other side's part, on any userfaultfd */

/* Put `len` bytes, whole pages, where nothing is yet, and wake who waits for it on this userfaultfd. 0 or a
 * negative errno, -EEXIST if there is something already. */
int userfault_copy(int fd, uint64_t dst, const void *src, size_t len);

/* Wake who waits for a page of this range of the other side's addresses. */
int userfault_wake(int fd, uint64_t addr, uint64_t len);

#endif
