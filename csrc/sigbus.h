/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Surviving a peer that truncates the file behind its guest memory: touching a page past the new
 * end of the file raises SIGBUS. Knows address ranges and the signal; knows nothing of regions,
 * rings or who owns a mapping.
 *
 * One table for the whole process, because a signal handler is one for the whole process. Nothing
 * is installed unless sigbus_install() is called. A hot path pays nothing: it looks at the range's
 * `broken` flag whenever it likes, once a batch for instance.
 */
#ifndef VHOST_SIGBUS_H
#define VHOST_SIGBUS_H

#include <stdbool.h>
#include <stddef.h>

/*
 * From now on until sigbus_unregister, a bus error inside [base, base + len) puts zero pages from
 * the faulting page to the end of the range, sets *broken to 1 with release, and lets the access
 * happen on them. The zero pages are private, readable and writable, as guest memory always is
 * mapped; the peer no longer sees what is written there.
 *
 * `base` is what mmap returned; `len` may end inside a page. Ranges must not overlap. A handle (>=
 * 0), or -EINVAL (base not page aligned, len 0, wraps), or -ENOMEM.
 */
int sigbus_register(void *base, size_t len, int *broken);

/* Before munmap, when no thread touches the range any more. */
void sigbus_unregister(int handle);

/*
 * Installs the handler, once for the process; any further call finds it there. A bus error anywhere
 * else, or a SIGBUS that somebody sent, goes to the handler that was there before, or ends the
 * process as it would have. 0, or -EBUSY: another handler was installed over ours since the first
 * call and we would not know whether it passes faults back to us; or the errno of sigaction(2),
 * negated.
 */
int sigbus_install(void);

/* Whether sigbus_install() ever succeeded. */
bool sigbus_installed(void);

/* Where the number of repairs is kept: a thread without time for every flag compares one number. */
const int *sigbus_repairs(void);

#endif
