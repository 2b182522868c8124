// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * A bare ping-pong over a Unix stream socket: requests and replies of given sizes, one call to send
 * each and one to receive it, nothing looked at. What the kernel charges for a conversation.
 */
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct step {
	uint32_t request, reply; /* bytes; reply 0: none */
};

static char buffer[8192];

static int get(int fd, size_t n)
{
	while (n) {
		ssize_t got = recv(fd, buffer, n, 0);

		if (got <= 0)
			return -1;
		n -= (size_t)got;
	}
	return 0;
}

/* Answers conversations on a listening socket, one after the other, for good. */
int floor_serve(int listener, const struct step *steps, uint32_t n)
{
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			return -1;
		for (uint32_t i = 0; !get(fd, steps[i].request); i = (i + 1) % n)
			if (steps[i].reply && send(fd, buffer, steps[i].reply, MSG_NOSIGNAL) < 0)
				break;
		close(fd);
	}
}

int floor_connect(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	return fd;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int talk(int fd, const struct step *steps, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (send(fd, buffer, steps[i].request, MSG_NOSIGNAL) < 0 || get(fd, steps[i].reply))
			return -1;
	return 0;
}

/* ns for `rounds` times the steps on one connection; 0: failed. */
uint64_t floor_round_trips(const char *path, const struct step *steps, uint32_t n, uint32_t rounds)
{
	int fd = floor_connect(path), rc = fd < 0;
	uint64_t start, total;

	for (uint32_t i = 0; !rc && i < n; i++) /* accepted, and warm */
		rc = talk(fd, steps, n);
	start = now();
	while (!rc && rounds--)
		rc = talk(fd, steps, n);
	total = now() - start;
	close(fd);
	return rc ? 0 : total;
}

/* ns for `rounds` conversations, each on a connection of its own. */
uint64_t floor_sessions(const char *path, const struct step *steps, uint32_t n, uint32_t rounds)
{
	uint64_t start = now();

	while (rounds--) {
		int fd = floor_connect(path);

		if (fd < 0 || talk(fd, steps, n))
			return 0;
		close(fd);
	}
	return now() - start;
}
