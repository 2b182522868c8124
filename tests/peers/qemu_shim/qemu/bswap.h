/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
#ifndef PYVHOST_QEMU_SHIM_BSWAP_H
#define PYVHOST_QEMU_SHIM_BSWAP_H

#include <endian.h>

#define le16_to_cpu le16toh
#define le32_to_cpu le32toh
#define le64_to_cpu le64toh
#define cpu_to_le16 htole16
#define cpu_to_le32 htole32
#define cpu_to_le64 htole64

#endif
