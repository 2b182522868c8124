/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What the programs that verify disks share: the contents of a byte as a function of seed and
 * position, and a generator of random numbers that repeats. A block at the wrong place, an older
 * one, or one of another run never passes, and any reader can check with the seed alone.
 */
#ifndef PYVHOST_TESTS_PATTERN_H
#define PYVHOST_TESTS_PATTERN_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define SECTOR 512ULL

static uint64_t random_state;

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static inline uint64_t random_below(uint64_t limit)
{
	random_state = mix(random_state);
	return random_state % limit;
}

/*
 * A multiple of 512, at most 512 << (exponents - 1) and at most what is left. As many small
 * pieces as large ones: the exponent is uniform, not the size.
 */
static inline uint64_t piece_length(uint64_t left, unsigned int exponents)
{
	uint64_t length = SECTOR << random_below(exponents);

	length -= random_below(length / SECTOR) / 2 * SECTOR;
	return length < left ? length : left;
}

static inline void fill(void *buffer, uint64_t seed, uint64_t offset, uint64_t length)
{
	uint64_t *word = buffer;

	for (uint64_t i = 0; i < length / 8; i++)
		word[i] = mix(seed ^ (offset + i * 8));
}

static inline void check(const void *buffer, uint64_t seed, uint64_t offset, uint64_t length)
{
	const uint64_t *word = buffer;

	for (uint64_t i = 0; i < length / 8; i++) {
		uint64_t want = mix(seed ^ (offset + i * 8));

		if (word[i] != want) {
			printf("FAIL byte %llu: is %016llx, should be %016llx\n",
			       (unsigned long long)(offset + i * 8), (unsigned long long)word[i],
			       (unsigned long long)want);
			exit(1);
		}
	}
}

static inline void check_zero(const unsigned char *buffer, uint64_t offset, uint64_t length)
{
	for (uint64_t i = 0; i < length; i++) {
		if (buffer[i]) {
			printf("FAIL byte %llu is not zero\n", (unsigned long long)(offset + i));
			exit(1);
		}
	}
}

#endif
