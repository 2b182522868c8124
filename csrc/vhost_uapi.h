/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What the kernel's vhost, vDPA and VDUSE devices take and give: numbers and structs of linux/vhost.h,
 * vhost_types.h and vduse.h, under the kernel's names, of the newest kernel whatever the machine that
 * compiles this has. A test compares each of them with the installed headers. Never included together
 * with those. Knows no device; what an ioctl is for stands in vhost/kernel/ioctls.py.
 */
#ifndef VHOST_UAPI_H
#define VHOST_UAPI_H

#include <stdint.h>
#include <sys/ioctl.h>

/* ------------------------------------------------------------------ vhost */

struct vhost_vring_state {
	uint32_t index;
	uint32_t num;
};

struct vhost_vring_file {
	uint32_t index;
	int fd; /* -1: none */
};

struct vhost_vring_addr {
	uint32_t index;
	uint32_t flags; /* bit VHOST_VRING_F_LOG */
	uint64_t desc_user_addr;
	uint64_t used_user_addr;
	uint64_t avail_user_addr;
	uint64_t log_guest_addr;
};

struct vhost_memory_region {
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t flags_padding;
};

struct vhost_memory {
	uint32_t nregions;
	uint32_t padding;
	struct vhost_memory_region regions[];
};

struct vhost_worker_state {
	uint32_t worker_id;
};

struct vhost_vring_worker {
	uint32_t index;
	uint32_t worker_id;
};

struct vhost_features_array {
	uint64_t count; /* of 64-bit words */
	uint64_t features[];
};

struct vhost_scsi_target {
	int abi_version;
	char vhost_wwpn[224];
	uint16_t vhost_tpgt;
	uint16_t reserved;
};

struct vhost_vdpa_config {
	uint32_t off;
	uint32_t len;
	uint8_t buf[];
};

struct vhost_vdpa_iova_range {
	uint64_t first;
	uint64_t last;
};

/* Read from and written to the device's descriptor. */
struct vhost_iotlb_msg {
	uint64_t iova;
	uint64_t size;
	uint64_t uaddr;
	uint8_t perm; /* VHOST_ACCESS_* */
	uint8_t type; /* VHOST_IOTLB_* */
};

struct vhost_msg {
	int type; /* VHOST_IOTLB_MSG */
	union {
		struct vhost_iotlb_msg iotlb;
		uint8_t padding[64];
	};
};

struct vhost_msg_v2 {
	uint32_t type; /* VHOST_IOTLB_MSG_V2 */
	uint32_t asid;
	union {
		struct vhost_iotlb_msg iotlb;
		uint8_t padding[64];
	};
};

/* ------------------------------------------------------------------ VDUSE */

enum { VDUSE_NAME_MAX = 256 };

struct vduse_dev_config {
	char name[VDUSE_NAME_MAX];
	uint32_t vendor_id;
	uint32_t device_id;
	uint64_t features;
	uint32_t vq_num;
	uint32_t vq_align;
	uint32_t ngroups; /* API version 1 */
	uint32_t nas;	  /* API version 1 */
	uint32_t reserved[11];
	uint32_t config_size;
	uint8_t config[];
};

struct vduse_iotlb_entry {
	uint64_t offset; /* into the file of the descriptor that is returned */
	uint64_t start;
	uint64_t last;
	uint8_t perm; /* VHOST_ACCESS_* */
};

struct vduse_iotlb_entry_v2 { /* begins as the one above */
	uint64_t offset;
	uint64_t start;
	uint64_t last;
	uint8_t perm;
	uint8_t padding[7];
	uint32_t asid;
	uint32_t reserved[11];
};

struct vduse_config_data {
	uint32_t offset;
	uint32_t length;
	uint8_t buffer[];
};

struct vduse_vq_config {
	uint32_t index;
	uint16_t max_size;
	uint16_t reserved1;
	uint32_t group; /* API version 1 */
	uint16_t reserved2[10];
};

struct vduse_vq_state_split {
	uint16_t avail_index;
};

struct vduse_vq_state_packed {
	uint16_t last_avail_counter;
	uint16_t last_avail_idx;
	uint16_t last_used_counter;
	uint16_t last_used_idx;
};

struct vduse_vq_info {
	uint32_t index;
	uint32_t num;
	uint64_t desc_addr;
	uint64_t driver_addr;
	uint64_t device_addr;
	union {
		struct vduse_vq_state_split split;
		struct vduse_vq_state_packed packed;
	};
	uint8_t ready;
};

struct vduse_vq_eventfd {
	uint32_t index;
	int fd; /* -1: none */
};

struct vduse_iova_umem {
	uint64_t uaddr;
	uint64_t iova;
	uint64_t size;
	uint32_t asid; /* API version 1 */
	uint32_t reserved[5];
};

struct vduse_iova_info {
	uint64_t start;
	uint64_t last;
	uint64_t capability; /* VDUSE_IOVA_CAP_* */
	uint32_t asid;	     /* API version 1 */
	uint32_t reserved[5];
};

/* Read from and written to /dev/vduse/NAME. */
struct vduse_vq_state {
	uint32_t index;
	union {
		struct vduse_vq_state_split split;
		struct vduse_vq_state_packed packed;
	};
};

struct vduse_vq_group_asid {
	uint32_t group;
	uint32_t asid;
};

struct vduse_dev_status {
	uint8_t status;
};

struct vduse_iova_range {
	uint64_t start;
	uint64_t last;
};

struct vduse_iova_range_v2 {
	uint64_t start;
	uint64_t last;
	uint32_t asid;
};

struct vduse_dev_request {
	uint32_t type; /* VDUSE_* of enum vduse_req_type */
	uint32_t request_id;
	uint32_t reserved[4];
	union {
		struct vduse_vq_state vq_state;
		struct vduse_dev_status s;
		struct vduse_iova_range iova;
		struct vduse_iova_range_v2 iova_v2;	    /* API version 1 */
		struct vduse_vq_group_asid vq_group_asid; /* API version 1 */
		uint32_t padding[32];
	};
};

struct vduse_dev_response {
	uint32_t request_id;
	uint32_t result; /* VDUSE_REQ_RESULT_* */
	uint32_t reserved[4];
	union {
		struct vduse_vq_state vq_state;
		uint32_t padding[32];
	};
};

/* ------------------------------------------------------------------ numbers */

/* clang-format off */
#define VHOST_UAPI_IOCTLS(X)                                                             \
	X(VHOST_GET_FEATURES,               _IOR(0xAF, 0x00, uint64_t))                      \
	X(VHOST_SET_FEATURES,               _IOW(0xAF, 0x00, uint64_t))                      \
	X(VHOST_SET_OWNER,                  _IO(0xAF, 0x01))                                 \
	X(VHOST_RESET_OWNER,                _IO(0xAF, 0x02))                                 \
	X(VHOST_SET_MEM_TABLE,              _IOW(0xAF, 0x03, struct vhost_memory))           \
	X(VHOST_SET_LOG_BASE,               _IOW(0xAF, 0x04, uint64_t))                      \
	X(VHOST_SET_LOG_FD,                 _IOW(0xAF, 0x07, int))                           \
	X(VHOST_NEW_WORKER,                 _IOR(0xAF, 0x08, struct vhost_worker_state))     \
	X(VHOST_FREE_WORKER,                _IOW(0xAF, 0x09, struct vhost_worker_state))     \
	X(VHOST_SET_VRING_NUM,              _IOW(0xAF, 0x10, struct vhost_vring_state))      \
	X(VHOST_SET_VRING_ADDR,             _IOW(0xAF, 0x11, struct vhost_vring_addr))       \
	X(VHOST_SET_VRING_BASE,             _IOW(0xAF, 0x12, struct vhost_vring_state))      \
	X(VHOST_GET_VRING_BASE,             _IOWR(0xAF, 0x12, struct vhost_vring_state))     \
	X(VHOST_SET_VRING_ENDIAN,           _IOW(0xAF, 0x13, struct vhost_vring_state))      \
	X(VHOST_GET_VRING_ENDIAN,           _IOW(0xAF, 0x14, struct vhost_vring_state))      \
	X(VHOST_ATTACH_VRING_WORKER,        _IOW(0xAF, 0x15, struct vhost_vring_worker))     \
	X(VHOST_GET_VRING_WORKER,           _IOWR(0xAF, 0x16, struct vhost_vring_worker))    \
	X(VHOST_SET_VRING_KICK,             _IOW(0xAF, 0x20, struct vhost_vring_file))       \
	X(VHOST_SET_VRING_CALL,             _IOW(0xAF, 0x21, struct vhost_vring_file))       \
	X(VHOST_SET_VRING_ERR,              _IOW(0xAF, 0x22, struct vhost_vring_file))       \
	X(VHOST_SET_VRING_BUSYLOOP_TIMEOUT, _IOW(0xAF, 0x23, struct vhost_vring_state))      \
	X(VHOST_GET_VRING_BUSYLOOP_TIMEOUT, _IOW(0xAF, 0x24, struct vhost_vring_state))      \
	X(VHOST_SET_BACKEND_FEATURES,       _IOW(0xAF, 0x25, uint64_t))                      \
	X(VHOST_GET_BACKEND_FEATURES,       _IOR(0xAF, 0x26, uint64_t))                      \
	X(VHOST_NET_SET_BACKEND,            _IOW(0xAF, 0x30, struct vhost_vring_file))       \
	X(VHOST_SCSI_SET_ENDPOINT,          _IOW(0xAF, 0x40, struct vhost_scsi_target))      \
	X(VHOST_SCSI_CLEAR_ENDPOINT,        _IOW(0xAF, 0x41, struct vhost_scsi_target))      \
	X(VHOST_SCSI_GET_ABI_VERSION,       _IOW(0xAF, 0x42, int))                           \
	X(VHOST_SCSI_SET_EVENTS_MISSED,     _IOW(0xAF, 0x43, uint32_t))                      \
	X(VHOST_SCSI_GET_EVENTS_MISSED,     _IOW(0xAF, 0x44, uint32_t))                      \
	X(VHOST_VSOCK_SET_GUEST_CID,        _IOW(0xAF, 0x60, uint64_t))                      \
	X(VHOST_VSOCK_SET_RUNNING,          _IOW(0xAF, 0x61, int))                           \
	X(VHOST_VDPA_GET_DEVICE_ID,         _IOR(0xAF, 0x70, uint32_t))                      \
	X(VHOST_VDPA_GET_STATUS,            _IOR(0xAF, 0x71, uint8_t))                       \
	X(VHOST_VDPA_SET_STATUS,            _IOW(0xAF, 0x72, uint8_t))                       \
	X(VHOST_VDPA_GET_CONFIG,            _IOR(0xAF, 0x73, struct vhost_vdpa_config))      \
	X(VHOST_VDPA_SET_CONFIG,            _IOW(0xAF, 0x74, struct vhost_vdpa_config))      \
	X(VHOST_VDPA_SET_VRING_ENABLE,      _IOW(0xAF, 0x75, struct vhost_vring_state))      \
	X(VHOST_VDPA_GET_VRING_NUM,         _IOR(0xAF, 0x76, uint16_t))                      \
	X(VHOST_VDPA_SET_CONFIG_CALL,       _IOW(0xAF, 0x77, int))                           \
	X(VHOST_VDPA_GET_IOVA_RANGE,        _IOR(0xAF, 0x78, struct vhost_vdpa_iova_range))  \
	X(VHOST_VDPA_GET_CONFIG_SIZE,       _IOR(0xAF, 0x79, uint32_t))                      \
	X(VHOST_VDPA_GET_AS_NUM,            _IOR(0xAF, 0x7A, uint32_t))                      \
	X(VHOST_VDPA_GET_VRING_GROUP,       _IOWR(0xAF, 0x7B, struct vhost_vring_state))     \
	X(VHOST_VDPA_SET_GROUP_ASID,        _IOW(0xAF, 0x7C, struct vhost_vring_state))      \
	X(VHOST_VDPA_SUSPEND,               _IO(0xAF, 0x7D))                                 \
	X(VHOST_VDPA_RESUME,                _IO(0xAF, 0x7E))                                 \
	X(VHOST_VDPA_GET_VRING_DESC_GROUP,  _IOWR(0xAF, 0x7F, struct vhost_vring_state))     \
	X(VHOST_VDPA_GET_VQS_COUNT,         _IOR(0xAF, 0x80, uint32_t))                      \
	X(VHOST_VDPA_GET_GROUP_NUM,         _IOR(0xAF, 0x81, uint32_t))                      \
	X(VHOST_VDPA_GET_VRING_SIZE,        _IOWR(0xAF, 0x82, struct vhost_vring_state))     \
	X(VHOST_GET_FEATURES_ARRAY,         _IOR(0xAF, 0x83, struct vhost_features_array))   \
	X(VHOST_SET_FEATURES_ARRAY,         _IOW(0xAF, 0x83, struct vhost_features_array))   \
	X(VHOST_SET_FORK_FROM_OWNER,        _IOW(0xAF, 0x84, uint8_t))                       \
	X(VHOST_GET_FORK_FROM_OWNER,        _IOR(0xAF, 0x85, uint8_t))                       \
	X(VDUSE_GET_API_VERSION,            _IOR(0x81, 0x00, uint64_t))                      \
	X(VDUSE_SET_API_VERSION,            _IOW(0x81, 0x01, uint64_t))                      \
	X(VDUSE_CREATE_DEV,                 _IOW(0x81, 0x02, struct vduse_dev_config))       \
	X(VDUSE_DESTROY_DEV,                _IOW(0x81, 0x03, char[VDUSE_NAME_MAX]))          \
	X(VDUSE_IOTLB_GET_FD,               _IOWR(0x81, 0x10, struct vduse_iotlb_entry))     \
	X(VDUSE_DEV_GET_FEATURES,           _IOR(0x81, 0x11, uint64_t))                      \
	X(VDUSE_DEV_SET_CONFIG,             _IOW(0x81, 0x12, struct vduse_config_data))      \
	X(VDUSE_DEV_INJECT_CONFIG_IRQ,      _IO(0x81, 0x13))                                 \
	X(VDUSE_VQ_SETUP,                   _IOW(0x81, 0x14, struct vduse_vq_config))        \
	X(VDUSE_VQ_GET_INFO,                _IOWR(0x81, 0x15, struct vduse_vq_info))         \
	X(VDUSE_VQ_SETUP_KICKFD,            _IOW(0x81, 0x16, struct vduse_vq_eventfd))       \
	X(VDUSE_VQ_INJECT_IRQ,              _IOW(0x81, 0x17, uint32_t))                      \
	X(VDUSE_IOTLB_REG_UMEM,             _IOW(0x81, 0x18, struct vduse_iova_umem))        \
	X(VDUSE_IOTLB_DEREG_UMEM,           _IOW(0x81, 0x19, struct vduse_iova_umem))        \
	X(VDUSE_IOTLB_GET_INFO,             _IOWR(0x81, 0x1a, struct vduse_iova_info))       \
	X(VDUSE_IOTLB_GET_FD2,              _IOWR(0x81, 0x1b, struct vduse_iotlb_entry_v2))
/* clang-format on */

#define VHOST_UAPI_ENUM(name, number) name = (int)(number),
enum { VHOST_UAPI_IOCTLS(VHOST_UAPI_ENUM) };
#undef VHOST_UAPI_ENUM

/* Bit numbers, not masks. */
enum {
	VHOST_VRING_F_LOG = 0,
	VHOST_F_LOG_ALL = 26,
	VHOST_NET_F_VIRTIO_NET_HDR = 27, /* vhost-net adds and strips the header itself */
};

enum {
	VHOST_BACKEND_F_IOTLB_MSG_V2 = 1,
	VHOST_BACKEND_F_IOTLB_BATCH = 2,
	VHOST_BACKEND_F_IOTLB_ASID = 3,
	VHOST_BACKEND_F_SUSPEND = 4,
	VHOST_BACKEND_F_RESUME = 5,
	VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK = 6,
	VHOST_BACKEND_F_DESC_ASID = 7,
	VHOST_BACKEND_F_IOTLB_PERSIST = 8,
};

enum { VHOST_VRING_LITTLE_ENDIAN = 0, VHOST_VRING_BIG_ENDIAN = 1 };
enum { VHOST_FORK_OWNER_KTHREAD = 0, VHOST_FORK_OWNER_TASK = 1 };

enum { VHOST_SCSI_ABI_VERSION = 1 };

enum { VHOST_ACCESS_RO = 1, VHOST_ACCESS_WO = 2, VHOST_ACCESS_RW = 3 };
enum { VHOST_IOTLB_MSG = 1, VHOST_IOTLB_MSG_V2 = 2 };
enum {
	VHOST_IOTLB_MISS = 1,
	VHOST_IOTLB_UPDATE = 2,
	VHOST_IOTLB_INVALIDATE = 3,
	VHOST_IOTLB_ACCESS_FAIL = 4,
	VHOST_IOTLB_BATCH_BEGIN = 5,
	VHOST_IOTLB_BATCH_END = 6,
};

/* The kernel's headers call these access rights VDUSE_ACCESS_*, with the same values. */
enum { VDUSE_IOVA_CAP_UMEM = 1 };
enum { VDUSE_REQ_RESULT_OK = 0, VDUSE_REQ_RESULT_FAILED = 1 };
enum {
	VDUSE_GET_VQ_STATE,
	VDUSE_SET_STATUS,
	VDUSE_UPDATE_IOTLB,
	VDUSE_SET_VQ_GROUP_ASID, /* API version 1 */
};

#endif
