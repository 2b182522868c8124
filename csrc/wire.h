/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The integers of the structures that devices and drivers exchange (VIRTIO 1.2, 1.4): any address, either
 * byte order. The memory is the guest's: each field is loaded once, whatever the compiler would like.
 */
#ifndef VHOST_WIRE_H
#define VHOST_WIRE_H

#include <stdbool.h>
#include <stdint.h>

#define WIRE_FIELDS_MAX 64u
#define WIRE_SIZE_MAX (WIRE_FIELDS_MAX * 8u)

struct wire_field {
	uint16_t offset;
	uint8_t size; /* 1, 2, 4 or 8 */
	bool swapped; /* not in this machine's byte order */
};

/* At an address without alignment, of whatever was declared there. */
struct wire_u16 {
	uint16_t v;
} __attribute__((packed, may_alias));
struct wire_u32 {
	uint32_t v;
} __attribute__((packed, may_alias));
struct wire_u64 {
	uint64_t v;
} __attribute__((packed, may_alias));

static inline uint64_t wire_load(const void *base, struct wire_field field)
{
	const uint8_t *at = (const uint8_t *)base + field.offset;

	switch (field.size) {
	case 1:
		return *(const volatile uint8_t *)at;
	case 2: {
		uint16_t v = ((const volatile struct wire_u16 *)at)->v;

		return field.swapped ? __builtin_bswap16(v) : v;
	}
	case 4: {
		uint32_t v = ((const volatile struct wire_u32 *)at)->v;

		return field.swapped ? __builtin_bswap32(v) : v;
	}
	default: {
		uint64_t v = ((const volatile struct wire_u64 *)at)->v;

		return field.swapped ? __builtin_bswap64(v) : v;
	}
	}
}

static inline void wire_store(void *base, struct wire_field field, uint64_t value)
{
	uint8_t *at = (uint8_t *)base + field.offset;

	switch (field.size) {
	case 1:
		*at = (uint8_t)value;
		break;
	case 2:
		((struct wire_u16 *)at)->v = field.swapped ? __builtin_bswap16((uint16_t)value) : (uint16_t)value;
		break;
	case 4:
		((struct wire_u32 *)at)->v = field.swapped ? __builtin_bswap32((uint32_t)value) : (uint32_t)value;
		break;
	default:
		((struct wire_u64 *)at)->v = field.swapped ? __builtin_bswap64(value) : value;
	}
}

#endif
