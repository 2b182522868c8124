/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* See userfault.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "userfault.h"
#include "userfault_uapi.h"

static int call(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) ? -errno : 0;
}

/* ------------------------------------------------------------ the descriptor */

static int open_fd(void)
{
	const int flags = O_CLOEXEC | O_NONBLOCK;
	int fd = (int)syscall(SYS_userfaultfd, flags), device, error;

	if (fd >= 0 || (errno != EPERM && errno != ENOSYS))
		return fd >= 0 ? fd : -errno;
	error = errno;
	device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0)
		return -error;
	fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
	error = errno;
	close(device);
	return fd >= 0 ? fd : -error;
}

int userfault_open(struct userfault *u)
{
	struct uffdio_api api = { .api = UFFD_API };
	int rc;

	memset(u, 0, sizeof(*u));
	u->pid = getpid();
	u->empty = u->peer = u->stop = -1;
	u->fd = open_fd();
	if (u->fd < 0)
		return u->fd;
	rc = call(u->fd, UFFDIO_API, &api);
	if (!rc && !(api.features & UFFD_FEATURE_MISSING_SHMEM))
		rc = -EOPNOTSUPP;
	if (!rc) {
		/* Now, for when it is needed there may be no descriptors left. */
		u->empty = memfd_create("abandoned", MFD_CLOEXEC);
		rc = u->empty < 0 ? -errno : 0;
	}
	if (!rc)
		rc = -pthread_mutex_init(&u->lock, NULL);
	if (rc) {
		if (u->empty >= 0)
			close(u->empty);
		close(u->fd);
	}
	return rc;
}

/* In the child of a fork what is done to the descriptor is done to the parent's memory, and the guard is
 * the parent's. */
static bool is_ours(const struct userfault *u)
{
	return getpid() == u->pid;
}

void userfault_close(struct userfault *u)
{
	if (u->guarded && is_ours(u)) {
		/* A new eventfd always has room for one. */
		(void)!eventfd_write(u->stop, 1);
		pthread_join(u->guard, NULL);
	}
	if (u->guarded) {
		close(u->peer);
		close(u->stop);
	}
	/* The other side has the userfaultfd, too: closing ours alone would change nothing. */
	userfault_end(u);
	close(u->empty);
	close(u->fd);
	free(u->ranges);
	pthread_mutex_destroy(&u->lock);
}

/* ------------------------------------------------------------ memory */

static int add_range(struct userfault *u, void *addr, size_t len)
{
	if (u->count == u->room) {
		size_t room = u->room ? 2 * u->room : 8;
		struct userfault_range *more = realloc(u->ranges, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		u->ranges = more;
		u->room = room;
	}
	u->ranges[u->count++] = (struct userfault_range){ addr, len };
	return 0;
}

static int register_range(int fd, void *addr, size_t len)
{
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)addr, .len = len },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int rc;

	/* What was mapped before the file's page went away would be found without a fault. */
	if (madvise(addr, len, MADV_DONTNEED))
		return -errno;
	/* A huge page would come as a whole, with neighbours that are not there. (A kernel that has
	 * none refuses the advice, which is as good.) */
	(void)madvise(addr, len, MADV_NOHUGEPAGE);
	rc = call(fd, UFFDIO_REGISTER, &reg);
	if (!rc && !(reg.ioctls & (uint64_t)1 << _UFFDIO_WAKE)) {
		call(fd, UFFDIO_UNREGISTER, &reg.range);
		rc = -EOPNOTSUPP;
	}
	return rc;
}

int userfault_register(struct userfault *u, void *addr, size_t len)
{
	int rc;

	pthread_mutex_lock(&u->lock);
	rc = u->abandoned ? -EPIPE : add_range(u, addr, len);
	if (!rc) {
		rc = register_range(u->fd, addr, len);
		if (rc)
			u->count--;
	}
	pthread_mutex_unlock(&u->lock);
	return rc;
}

int userfault_end(struct userfault *u)
{
	int rc = 0;

	if (!is_ours(u))
		return 0;
	pthread_mutex_lock(&u->lock);
	for (size_t i = 0; i < u->count && !u->abandoned; i++) {
		struct uffdio_range range = { (uintptr_t)u->ranges[i].addr, u->ranges[i].len };
		int error = call(u->fd, UFFDIO_UNREGISTER, &range);

		if (!rc)
			rc = error;
	}
	u->count = 0;
	pthread_mutex_unlock(&u->lock);
	return rc;
}

void userfault_abandon(struct userfault *u)
{
	if (!is_ours(u))
		return;
	pthread_mutex_lock(&u->lock);
	for (size_t i = 0; i < u->count && !u->abandoned; i++) {
		struct userfault_range *r = &u->ranges[i];

		if (mmap(r->addr, r->len, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_FIXED | MAP_NORESERVE, u->empty, 0) == MAP_FAILED) {
			/* Out of memory for mappings. Zeros are worse, waiting for ever is worst. */
			struct uffdio_range range = { (uintptr_t)r->addr, r->len };

			call(u->fd, UFFDIO_UNREGISTER, &range);
		}
	}
	/* Only when all of it is gone, or the first that wakes would meet pages that never come. */
	for (size_t i = 0; i < u->count && !u->abandoned; i++)
		userfault_wake(u->fd, (uintptr_t)u->ranges[i].addr, u->ranges[i].len);
	u->abandoned = true;
	pthread_mutex_unlock(&u->lock);
}

/* ------------------------------------------------------------ the guard */

static void *guard(void *opaque)
{
	struct userfault *u = opaque;
	struct pollfd fds[] = {
		{ .fd = u->stop, .events = POLLIN },
		{ .fd = u->peer, .events = POLLRDHUP },
	};

	while (poll(fds, 2, -1) < 0 && errno == EINTR)
		;
	if (!fds[0].revents)
		userfault_abandon(u);
	return NULL;
}

int userfault_guard(struct userfault *u, int peer)
{
	sigset_t all, before;
	int rc;

	if (u->guarded)
		return -EALREADY;
	u->peer = fcntl(peer, F_DUPFD_CLOEXEC, 0);
	if (u->peer < 0)
		return -errno;
	u->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->stop < 0) {
		rc = -errno;
		close(u->peer);
		return rc;
	}
	/* The program's signals are for the program's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	rc = -pthread_create(&u->guard, NULL, guard, u);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (rc) {
		close(u->peer);
		close(u->stop);
		return rc;
	}
	u->guarded = true;
	return 0;
}

/* ------------------------------------------------------------ the other side's part */

int userfault_copy(int fd, uint64_t dst, const void *src, size_t len)
{
	struct uffdio_copy copy = { .dst = dst, .src = (uintptr_t)src, .len = len };
	int rc;

	/* The kernel may stop on the way, when the address space is changing, and says how far it came. */
	while ((rc = call(fd, UFFDIO_COPY, &copy)) == -EAGAIN) {
		if (copy.copy > 0) {
			copy.dst += (uint64_t)copy.copy;
			copy.src += (uint64_t)copy.copy;
			copy.len -= (uint64_t)copy.copy;
		}
		copy.copy = 0;
	}
	return rc;
}

int userfault_wake(int fd, uint64_t addr, uint64_t len)
{
	struct uffdio_range range = { addr, len };

	return call(fd, UFFDIO_WAKE, &range);
}
