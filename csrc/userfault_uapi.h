/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The part of linux/userfaultfd.h that post-copy needs, under the kernel's names, so that any machine can
 * compile it. A test compares each number and struct with the installed headers. Never included together
 * with those.
 */
#ifndef USERFAULT_UAPI_H
#define USERFAULT_UAPI_H

#include <stdint.h>
#include <sys/ioctl.h>

#define UFFD_API ((uint64_t)0xAA)
#define UFFD_FEATURE_MISSING_HUGETLBFS (1 << 4)
#define UFFD_FEATURE_MISSING_SHMEM (1 << 5)

struct uffdio_api {
	uint64_t api;
	uint64_t features;
	uint64_t ioctls;
};

struct uffdio_range {
	uint64_t start;
	uint64_t len;
};

#define UFFDIO_REGISTER_MODE_MISSING ((uint64_t)1 << 0)

struct uffdio_register {
	struct uffdio_range range;
	uint64_t mode;
	uint64_t ioctls; /* bits of the _UFFDIO numbers that the range allows */
};

struct uffdio_copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t copy; /* what was copied, or a negative errno */
};

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_PAGEFAULT_FLAG_WRITE (1 << 0)

/* What read() gives, for UFFD_EVENT_PAGEFAULT. */
struct uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags;
			uint64_t address;
		} pagefault;
		uint64_t reserved[3];
	} arg;
};

#define _UFFDIO_REGISTER (0x00)
#define _UFFDIO_UNREGISTER (0x01)
#define _UFFDIO_WAKE (0x02)
#define _UFFDIO_COPY (0x03)
#define _UFFDIO_API (0x3F)

#define UFFDIO 0xAA
#define UFFDIO_API _IOWR(UFFDIO, _UFFDIO_API, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(UFFDIO, _UFFDIO_REGISTER, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(UFFDIO, _UFFDIO_UNREGISTER, struct uffdio_range)
#define UFFDIO_WAKE _IOR(UFFDIO, _UFFDIO_WAKE, struct uffdio_range)
#define UFFDIO_COPY _IOWR(UFFDIO, _UFFDIO_COPY, struct uffdio_copy)

/* Of /dev/userfaultfd, where access to the file is what counts instead of a capability. */
#define USERFAULTFD_IOC 0xAA
#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)

#endif
