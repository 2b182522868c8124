/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* What contrib/vhost-user-blk needs of QEMU's own osdep.h, so that it builds without QEMU's build. */
#ifndef PYVHOST_QEMU_SHIM_OSDEP_H
#define PYVHOST_QEMU_SHIM_OSDEP_H

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "include/compiler.h"

#endif
