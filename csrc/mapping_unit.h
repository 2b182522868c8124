/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* In what unit a file is mapped. Knows file systems, and neither memory nor regions. */
#ifndef MAPPING_UNIT_H
#define MAPPING_UNIT_H

#include <stdint.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Mappings of hugetlbfs begin and end at its page size, whatever that of the processor is: mmap() rounds
 * a length up to it, and munmap() refuses another one. */
static inline uint64_t mapping_unit(int fd)
{
	struct statfs fs;

	if (!fstatfs(fd, &fs) && fs.f_type == 0x958458f6 /* HUGETLBFS_MAGIC */ && fs.f_bsize > 0)
		return fs.f_bsize;
	return sysconf(_SC_PAGESIZE);
}

#endif
