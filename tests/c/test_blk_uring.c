/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * io_uring where a sandbox forbids it while something is under way: that comes back nonetheless, and who waits
 * for it sleeps. In a process of its own, for a filter of system calls is never taken away.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blk_uring.h"
#include "check.h"

#define TAKES_US 50000u

/* Every other system call may be made. */
static void forbid(unsigned number)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(code) / sizeof(code[0]), .filter = code };

	CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

/* Reads from a pipe, which takes as long as nobody writes. */
static void read_and_wait(int from, int tell)
{
	struct blk_disk disk = { .fd = from };
	uint8_t data[8];
	struct iovec iov = { data, sizeof(data) };
	struct blk_request r = { .data = { .iov = &iov, .num = 1, .len = sizeof(data) }, .todo = BLK_READ };
	int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct blk_uring *u = blk_uring_new(1, wake);
	struct blk_request *back = NULL;
	unsigned looks = 0;
	bool rest;

	CHECK(u);
	CHECK(!blk_uring_submit(u, &disk, &r));
	CHECK_EQ(blk_uring_out(u), 1);
	CHECK(!blk_uring_ready(u));
	forbid(__NR_io_uring_enter);
	blk_uring_wait(u);
	CHECK(!blk_uring_ready(u));
	CHECK_EQ(write(tell, "", 1), 1);
	while (!(back = blk_uring_reap(u, &rest))) {
		blk_uring_wait(u);
		looks++;
	}
	CHECK(back == &r);
	CHECK(!rest);
	CHECK_EQ(r.status, BLK_S_OK);
	CHECK(!memcmp(data, "8 bytes.", sizeof(data)));
	/* One a millisecond; who does not sleep looks more often than this in a fraction of the time. */
	CHECK(looks < 10000);
	blk_uring_free(u);
	close(wake);
}

static void test_forbidden_under_way(void)
{
	int data[2], told[2], status;
	char go;
	pid_t pid;

	CHECK_EQ(pipe(data), 0);
	CHECK_EQ(pipe(told), 0);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		read_and_wait(data[0], told[1]);
		_exit(0);
	}
	close(told[1]);
	if (read(told[0], &go, 1) == 1) {
		usleep(TAKES_US);
		CHECK_EQ(write(data[1], "8 bytes.", 8), 8);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	close(data[0]);
	close(data[1]);
	close(told[0]);
}

int main(void)
{
	int rc = blk_uring_probe();

	if (rc < 0)
		printf("no io_uring here: %s\n", strerror(-rc));
	else
		RUN(test_forbidden_under_way);
	return 0;
}
