/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Signalling through an eventfd that the peer shares. It has no blocking mode of its own for each of us:
 * the peer may make it block at any time, and fill its counter, and then whoever signals it waits for
 * as long as the peer likes. So the mode is looked at each time, which is a cheap system call, and one
 * that blocks is asked before it is written to. (Who fills it between the two still stops us, and
 * there is no system call against that for eventfds.) Knows neither rings nor Python.
 */
#ifndef VHOST_EVENTFD_H
#define VHOST_EVENTFD_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

static inline bool eventfd_has_room(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLOUT };
	int flags = fcntl(fd, F_GETFL);

	if (flags >= 0 && flags & O_NONBLOCK)
		return true;
	/* What poll() has to say of an error, write() says better. */
	return poll(&p, 1, 0) != 0;
}

/* 0 or a negative errno. One that is full is as readable as it can be: that is no error. */
static inline int eventfd_signal(int fd)
{
	uint64_t one = 1;

	if (fd < 0 || !eventfd_has_room(fd))
		return 0;
	while (write(fd, &one, sizeof(one)) < 0) {
		if (errno == EAGAIN)
			return 0;
		if (errno != EINTR)
			return -errno;
	}
	return 0;
}

#endif
