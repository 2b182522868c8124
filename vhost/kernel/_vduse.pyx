# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VDUSE's ioctls and messages, over the kernel's own structs: see _ioctl.pyx.

The messages are those that /dev/vduse/NAME gives to read() and takes by write().
"""

import os
from collections import namedtuple

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport read, write

from vhost.kernel._ioctl cimport Ioctl

__all__ = [
    "CreateDev", "DestroyDev", "IotlbFd", "IovaInfo", "Request", "Umem", "VqConfig", "VqInfo", "read_request",
    "write_response",
]

Request = namedtuple("Request", "type id ring status start last asid group")

cdef extern from "vhost_uapi.h" nogil:
    enum:
        VDUSE_NAME_MAX
        VDUSE_REQ_RESULT_OK
        VDUSE_REQ_RESULT_FAILED
        VDUSE_GET_VQ_STATE
        VDUSE_SET_STATUS
        VDUSE_UPDATE_IOTLB
        VDUSE_SET_VQ_GROUP_ASID

    struct vduse_dev_config:
        char *name
        uint32_t vendor_id
        uint32_t device_id
        uint64_t features
        uint32_t vq_num
        uint32_t vq_align
        uint32_t ngroups
        uint32_t nas
        uint32_t config_size
        uint8_t *config

    struct vduse_iotlb_entry_v2:
        uint64_t offset
        uint64_t start
        uint64_t last
        uint8_t perm
        uint32_t asid

    struct vduse_vq_config:
        uint32_t index
        uint16_t max_size
        uint32_t group

    struct vduse_vq_state_split:
        uint16_t avail_index

    struct vduse_vq_state_packed:
        uint16_t last_avail_counter
        uint16_t last_avail_idx
        uint16_t last_used_counter
        uint16_t last_used_idx

    struct vduse_vq_info:
        uint32_t index
        uint32_t num
        uint64_t desc_addr
        uint64_t driver_addr
        uint64_t device_addr
        vduse_vq_state_split split
        vduse_vq_state_packed packed
        uint8_t ready

    struct vduse_iova_umem:
        uint64_t uaddr
        uint64_t iova
        uint64_t size
        uint32_t asid

    struct vduse_iova_info:
        uint64_t start
        uint64_t last
        uint64_t capability
        uint32_t asid

    struct vduse_vq_state:
        uint32_t index
        vduse_vq_state_split split
        vduse_vq_state_packed packed

    struct vduse_vq_group_asid:
        uint32_t group
        uint32_t asid

    struct vduse_dev_status:
        uint8_t status

    struct vduse_iova_range_v2:
        uint64_t start
        uint64_t last
        uint32_t asid

    struct vduse_dev_request:
        uint32_t type
        uint32_t request_id
        vduse_vq_state vq_state
        vduse_dev_status s
        vduse_iova_range_v2 iova_v2
        vduse_vq_group_asid vq_group_asid

    struct vduse_dev_response:
        uint32_t request_id
        uint32_t result
        vduse_vq_state vq_state

GET_VQ_STATE = VDUSE_GET_VQ_STATE
SET_STATUS = VDUSE_SET_STATUS
UPDATE_IOTLB = VDUSE_UPDATE_IOTLB
SET_VQ_GROUP_ASID = VDUSE_SET_VQ_GROUP_ASID


cdef bytes device_name(str name):
    raw = name.encode()
    if not 0 < len(raw) < VDUSE_NAME_MAX:
        raise ValueError(f"VDUSE name of {len(raw)} bytes, must be 1 to {VDUSE_NAME_MAX - 1}")
    return raw


cdef class CreateDev(Ioctl):
    argument = "device"

    def __call__(
        self, int fd, str name not None, *, uint32_t device_id, uint64_t features, uint32_t vq_num, config,
        uint32_t vendor_id=0, uint32_t vq_align=4096, uint32_t ngroups=0, uint32_t nas=0,
    ):
        cdef int rc
        cdef bytes raw = device_name(name), space = bytes(config)
        cdef size_t size = sizeof(vduse_dev_config) + len(space)
        cdef vduse_dev_config *arg = <vduse_dev_config *>PyMem_Malloc(size)
        if arg == NULL:
            raise MemoryError
        try:
            memset(arg, 0, size)
            memcpy(<void *>arg.name, <const char *>raw, len(raw))
            arg.vendor_id = vendor_id
            arg.device_id = device_id
            arg.features = features
            arg.vq_num = vq_num
            arg.vq_align = vq_align
            arg.ngroups = ngroups
            arg.nas = nas
            arg.config_size = len(space)
            memcpy(arg.config, <const char *>space, len(space))
            rc = self.call(fd, arg)
            if rc < 0:
                what = f"device id {device_id}, features {features:#x}, {vq_num} queues"
                self.fail(rc, f"{name!r}, {what}, {len(space)} bytes of configuration")
        finally:
            PyMem_Free(arg)


cdef class DestroyDev(Ioctl):
    argument = "name"

    def __call__(self, int fd, str name not None):
        cdef int rc
        cdef char[VDUSE_NAME_MAX] arg
        cdef bytes raw = device_name(name)
        memset(arg, 0, sizeof(arg))
        memcpy(arg, <const char *>raw, len(raw))
        rc = self.call(fd, arg)
        if rc < 0:
            self.fail(rc, repr(name))


cdef class VqConfig(Ioctl):
    argument = "queue, size"

    def __call__(self, int fd, uint32_t index, uint16_t max_size, *, uint32_t group=0):
        cdef int rc
        cdef vduse_vq_config arg
        memset(&arg, 0, sizeof(arg))
        arg.index = index
        arg.max_size = max_size
        arg.group = group
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"ring {index}, size {max_size}, group {group}")


cdef uint32_t base_of(const vduse_vq_state_packed *state) noexcept:
    # As in SET_VRING_BASE.
    return (
        (state.last_avail_idx & 0x7fff) | <uint32_t>(state.last_avail_counter & 1) << 15
        | <uint32_t>(state.last_used_idx & 0x7fff) << 16 | <uint32_t>(state.last_used_counter & 1) << 31
    )


cdef class VqInfo(Ioctl):
    argument = "queue"

    def __call__(self, int fd, uint32_t index, *, bint packed):
        cdef int rc
        cdef vduse_vq_info arg
        cdef uint32_t base
        memset(&arg, 0, sizeof(arg))
        arg.index = index
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"ring {index}")
        base = base_of(&arg.packed) if packed else arg.split.avail_index
        return arg.num, arg.desc_addr, arg.driver_addr, arg.device_addr, base, arg.ready != 0


cdef class IotlbFd(Ioctl):
    argument = "IOVA range"

    def __call__(self, int fd, uint64_t start, uint64_t last, *, uint32_t asid=0):
        # VDUSE_IOTLB_GET_FD's argument is how that of GET_FD2 begins.
        cdef vduse_iotlb_entry_v2 arg
        cdef int file
        memset(&arg, 0, sizeof(arg))
        arg.start = start
        arg.last = last
        arg.asid = asid
        file = self.call(fd, &arg)
        if file < 0:
            self.fail(file, f"IOVA {start:#x} to {last:#x}, address space {asid}")
        return file, arg.offset, arg.start, arg.last, arg.perm


cdef class Umem(Ioctl):
    argument = "memory range"

    def __call__(self, int fd, uint64_t iova, uint64_t size, uint64_t uaddr=0, *, uint32_t asid=0):
        cdef int rc
        cdef vduse_iova_umem arg
        memset(&arg, 0, sizeof(arg))
        arg.uaddr = uaddr
        arg.iova = iova
        arg.size = size
        arg.asid = asid
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"IOVA {iova:#x}, size {size:#x}, our address {uaddr:#x}, address space {asid}")


cdef class IovaInfo(Ioctl):
    argument = "IOVA range"

    def __call__(self, int fd, uint64_t start, uint64_t last, *, uint32_t asid=0):
        cdef int rc
        cdef vduse_iova_info arg
        memset(&arg, 0, sizeof(arg))
        arg.start = start
        arg.last = last
        arg.asid = asid
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"IOVA {start:#x} to {last:#x}, address space {asid}")
        return arg.start, arg.last, arg.capability


# ---------------------------------------------------------------------- messages


def read_request(int fd):
    cdef vduse_dev_request request
    cdef ssize_t rc
    memset(&request, 0, sizeof(request))
    with nogil:
        rc = read(fd, &request, sizeof(request))
    if rc < 0:
        if errno in (EAGAIN, EINTR):
            return None
        raise OSError(errno, f"reading VDUSE requests: {os.strerror(errno)}")
    if rc < <ssize_t>sizeof(request):
        return None
    if request.type == VDUSE_GET_VQ_STATE:
        return Request(request.type, request.request_id, request.vq_state.index, 0, 0, 0, 0, 0)
    if request.type == VDUSE_SET_STATUS:
        return Request(request.type, request.request_id, 0, request.s.status, 0, 0, 0, 0)
    if request.type == VDUSE_UPDATE_IOTLB:
        return Request(
            request.type, request.request_id, 0, 0, request.iova_v2.start, request.iova_v2.last, request.iova_v2.asid, 0
        )
    if request.type == VDUSE_SET_VQ_GROUP_ASID:
        return Request(
            request.type, request.request_id, 0, 0, 0, 0, request.vq_group_asid.asid, request.vq_group_asid.group
        )
    return Request(request.type, request.request_id, 0, 0, 0, 0, 0, 0)


def write_response(int fd, uint32_t request_id, bint ok, *, uint32_t index=0, base=None, bint packed=False):
    cdef vduse_dev_response response
    cdef uint32_t place = 0 if base is None else base
    cdef ssize_t rc
    memset(&response, 0, sizeof(response))
    response.request_id = request_id
    response.result = VDUSE_REQ_RESULT_OK if ok else VDUSE_REQ_RESULT_FAILED
    if base is not None:
        response.vq_state.index = index
        if packed:
            response.vq_state.packed.last_avail_idx = place & 0x7fff
            response.vq_state.packed.last_avail_counter = place >> 15 & 1
            response.vq_state.packed.last_used_idx = place >> 16 & 0x7fff
            response.vq_state.packed.last_used_counter = place >> 31
        else:
            response.vq_state.split.avail_index = <uint16_t>place
    with nogil:
        rc = write(fd, &response, sizeof(response))
    if rc < 0:
        raise OSError(errno, f"answering a VDUSE request: {os.strerror(errno)}")
