/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a tap costs without vhost: a system call a frame, in a loop that does nothing else. Knows neither
 * rings nor what is in a frame.
 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <unistd.h>

static int until(int fd, short events)
{
	struct pollfd p = { .fd = fd, .events = events };

	return errno == EAGAIN && poll(&p, 1, 10000) == 1;
}

/* How many frames went: n, unless the tap failed. */
unsigned tap_floor_send(int fd, const void *frame, size_t size, unsigned n)
{
	unsigned done = 0;

	while (done < n) {
		if (write(fd, frame, size) >= 0)
			done++;
		else if (!until(fd, POLLOUT))
			break;
	}
	return done;
}

unsigned tap_floor_recv(int fd, unsigned n)
{
	char frame[2048];
	unsigned done = 0;

	while (done < n) {
		if (read(fd, frame, sizeof(frame)) >= 0)
			done++;
		else if (!until(fd, POLLIN))
			break;
	}
	return done;
}
