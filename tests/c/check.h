/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The least that a C unit test needs: checks that say what they saw, and a runner. A failed check
 * ends the program at once, so that the sanitizers' own exit is never mistaken for a pass.
 *
 *	static void test_something(void) { CHECK(ptr); CHECK_EQ(have, want); }
 *	int main(void) { RUN(test_something); return 0; }
 */
#ifndef VHOST_TEST_CHECK_H
#define VHOST_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* Set by parametrised tests, shown with every failure. */
static const char *check_context __attribute__((unused)) = "";

#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: %s: [%s] not true: %s\n", __FILE__, __LINE__,      \
				__func__, check_context, #cond);                                   \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

#define CHECK_EQ(have, want)                                                                       \
	do {                                                                                       \
		long long have_ = (long long)(have), want_ = (long long)(want);                    \
		if (have_ != want_) {                                                              \
			fprintf(stderr, "%s:%d: %s: [%s] %s is %lld (0x%llx), not %lld (0x%llx)\n", \
				__FILE__, __LINE__, __func__, check_context, #have, have_, have_,  \
				want_, want_);                                                     \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

#define RUN(test)                                                                                  \
	do {                                                                                       \
		test();                                                                            \
		printf("ok %s\n", #test);                                                          \
	} while (0)

#endif
