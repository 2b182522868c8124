# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""vhost's ioctls as callables: one class for each kind of argument, over the kernel's own structs.

An instance is a row of the table in ioctls.py, and calling it with a descriptor and plain Python values
makes the call. Every call releases the GIL, for some wait for another process (vDPA). Knows structs and
how an error is told; what an ioctl is for stands in its row.
"""

import os

from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport read, write

from vhost.memory cimport GuestMemory, Region

from vhost.errors import IoctlError

__all__ = [
    "ConfigRange", "Features", "Ioctl", "IovaRange", "MemTable", "Plain", "Scalar", "ScsiTarget", "VringAddr",
    "VringFile", "VringState", "iotlb_read", "iotlb_write",
]

cdef extern from *:
    """
    #include "vhost_uapi.h"
    static const struct uapi_number { const char *name; unsigned int number; } uapi_numbers[] = {
    #define ROW(name, number) { #name, number },
        VHOST_UAPI_IOCTLS(ROW)
    #undef ROW
    };
    #define UAPI_NUMBERS (sizeof(uapi_numbers) / sizeof(uapi_numbers[0]))
    """
    struct uapi_number:
        const char *name
        unsigned int number
    uapi_number *uapi_numbers
    size_t UAPI_NUMBERS

cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl" (int, unsigned long, void *)
    enum:
        _IOC_READ
        _IOC_WRITE
    unsigned int _IOC_DIR(unsigned int)
    unsigned int _IOC_TYPE(unsigned int)
    unsigned int _IOC_NR(unsigned int)
    unsigned int _IOC_SIZE(unsigned int)

cdef extern from "vhost_uapi.h" nogil:
    enum:
        VHOST_IOTLB_MSG
        VHOST_IOTLB_MSG_V2

    struct vhost_vring_state:
        uint32_t index
        uint32_t num

    struct vhost_vring_file:
        uint32_t index
        int fd

    struct vhost_vring_addr:
        uint32_t index
        uint32_t flags
        uint64_t desc_user_addr
        uint64_t used_user_addr
        uint64_t avail_user_addr
        uint64_t log_guest_addr

    struct vhost_memory_region:
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
        uint64_t flags_padding

    struct vhost_memory:
        uint32_t nregions
        uint32_t padding
        vhost_memory_region *regions

    struct vhost_features_array:
        uint64_t count
        uint64_t *features

    struct vhost_scsi_target:
        int abi_version
        char *vhost_wwpn
        uint16_t vhost_tpgt

    struct vhost_vdpa_config:
        uint32_t off
        uint32_t len
        uint8_t *buf

    struct vhost_vdpa_iova_range:
        uint64_t first
        uint64_t last

    struct vhost_iotlb_msg:
        uint64_t iova
        uint64_t size
        uint64_t uaddr
        uint8_t perm
        uint8_t type

    # The one of version 1 has padding where this has the address space.
    struct vhost_msg_v2:
        uint32_t type
        uint32_t asid
        vhost_iotlb_msg iotlb


cdef dict NUMBERS = {uapi_numbers[i].name.decode(): uapi_numbers[i].number for i in range(UAPI_NUMBERS)}


cdef class Ioctl:
    argument = ""

    def __init__(self, str name not None, devices, str doc not None, *, str feature="", errors=None):
        self.name = name
        self.number = NUMBERS[name]
        self.devices = devices
        self.doc = doc
        self.feature = feature
        self.errors = errors or {}

    @staticmethod
    def names():
        return tuple(NUMBERS)

    @property
    def nr(self):
        return _IOC_NR(self.number)

    @property
    def type(self):
        return _IOC_TYPE(self.number)

    @property
    def size(self):
        return _IOC_SIZE(self.number)

    @property
    def direction(self):
        # As the program sees it: "r" is an ioctl that it reads something with.
        cdef unsigned int way = _IOC_DIR(self.number)
        return ("r" if way & _IOC_READ else "") + ("w" if way & _IOC_WRITE else "")

    cdef int call(self, int fd, void *arg) except? -4096:
        # What the ioctl returned, or a negative errno, for `fail` to tell.
        cdef int rc, failed
        while True:
            with nogil:
                rc = c_ioctl(fd, self.number, arg)
                failed = errno
            if rc >= 0:
                return rc
            if failed != EINTR:
                return -failed
            PyErr_CheckSignals()

    cdef int fail(self, int rc, str detail) except -1:
        raise IoctlError(-rc, self.name, detail, self.errors.get(-rc, ""))

    def __repr__(self):
        return f"<{self.name} {self.number:#x}>"


cdef class Plain(Ioctl):
    def __call__(self, int fd):
        cdef int rc = self.call(fd, NULL)
        if rc < 0:
            self.fail(rc, "")


cdef union scalar:
    uint8_t u8
    uint16_t u16
    uint32_t u32
    uint64_t u64


cdef class Scalar(Ioctl):
    argument = "integer"

    def __init__(self, name, devices, doc, *, gives=False, **columns):
        super().__init__(name, devices, doc, **columns)
        # By the number's own word, but for VHOST_SCSI_GET_*, which say the opposite of what they do.
        self.gives = gives or _IOC_DIR(self.number) == _IOC_READ
        self.bytes = _IOC_SIZE(self.number)

    def __call__(self, int fd, value=0):
        cdef scalar arg
        cdef int64_t bits
        arg.u64 = 0
        cdef int rc
        if self.gives:
            rc = self.call(fd, &arg)
            if rc < 0:
                self.fail(rc, "")
            if self.bytes == 8:
                return arg.u64
            if self.bytes == 4:
                return arg.u32
            return arg.u16 if self.bytes == 2 else arg.u8
        if self.bytes == 8:
            arg.u64 = value
        else:
            bits = value
            if not -(<int64_t>1 << (8 * self.bytes - 1)) <= bits < <int64_t>1 << 8 * self.bytes:
                raise OverflowError(f"{self.name}: {value:#x} does not fit {self.bytes} bytes")
            if self.bytes == 4:
                arg.u32 = <uint32_t>bits
            else:
                arg.u8 = <uint8_t>bits
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"{value:#x}")
        return None


cdef class VringState(Ioctl):
    argument = "ring, number"

    def __init__(self, name, devices, doc, *, gives=False, what="ring", value="num", **columns):
        super().__init__(name, devices, doc, **columns)
        self.gives = gives
        self.what = what
        self.value = value

    def __call__(self, int fd, index, num=0):
        cdef vhost_vring_state arg
        cdef int rc
        arg.index = index
        arg.num = num
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"{self.what} {index}" + ("" if self.gives else f", {self.value} {num:#x}"))
        return arg.num if self.gives else None


cdef class VringFile(Ioctl):
    argument = "ring, descriptor"

    def __call__(self, int fd, index, file):
        cdef int rc
        cdef vhost_vring_file arg
        arg.index = index
        arg.fd = -1 if file is None else file
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"ring {index}, fd {file}")


cdef class VringAddr(Ioctl):
    argument = "ring, addresses"

    def __call__(self, int fd, index, desc, avail, used, *, log=0, flags=0):
        cdef int rc
        cdef vhost_vring_addr arg
        arg.index = index
        arg.flags = flags
        arg.desc_user_addr = desc
        arg.used_user_addr = used
        arg.avail_user_addr = avail
        arg.log_guest_addr = log
        rc = self.call(fd, &arg)
        if rc < 0:
            where = f"desc {desc:#x}, avail {avail:#x}, used {used:#x}"
            self.fail(rc, f"ring {index}, {where}, log {log:#x}, flags {flags:#x}")


cdef class MemTable(Ioctl):
    argument = "memory"

    def __call__(self, int fd, GuestMemory memory not None):
        cdef int rc
        # The addresses that the kernel is given are those of our own mappings.
        cdef Py_ssize_t n = len(memory.regions), i
        cdef size_t size = sizeof(vhost_memory) + n * sizeof(vhost_memory_region)
        cdef Region region
        cdef vhost_memory *table = <vhost_memory *>PyMem_Malloc(size)
        if table == NULL:
            raise MemoryError
        try:
            memset(table, 0, size)
            table.nregions = n
            for i in range(n):
                region = memory.regions[i]
                table.regions[i].guest_phys_addr = region.guest_addr
                table.regions[i].memory_size = region.size
                table.regions[i].userspace_addr = <uint64_t>region.host
            rc = self.call(fd, table)
            if rc < 0:
                self.fail(rc, f"{n} regions")
        finally:
            PyMem_Free(table)


cdef class Features(Ioctl):
    argument = "feature words"

    def __call__(self, int fd, features=None, *, uint32_t words=2):
        cdef int rc
        # Read without `features`; a set of any width otherwise.
        cdef uint64_t count, i
        cdef vhost_features_array *arg
        if features is not None:
            words = max(1, -(-features.bit_length() // 64))
        count = words
        arg = <vhost_features_array *>PyMem_Malloc((1 + count) * 8)
        if arg == NULL:
            raise MemoryError
        try:
            memset(arg, 0, (1 + count) * 8)
            arg.count = count
            if features is not None:
                for i in range(count):
                    arg.features[i] = features >> 64 * i & 0xffffffffffffffff
                rc = self.call(fd, arg)
                if rc < 0:
                    self.fail(rc, f"{features:#x}")
                return None
            rc = self.call(fd, arg)
            if rc < 0:
                self.fail(rc, "")
            return sum([<object>arg.features[i] << 64 * i for i in range(count)])
        finally:
            PyMem_Free(arg)


cdef class ScsiTarget(Ioctl):
    argument = "target"

    def __call__(self, int fd, str wwpn not None, *, uint16_t tpgt=0, int abi_version=1):
        cdef int rc
        cdef vhost_scsi_target arg
        name = wwpn.encode()
        if len(name) >= 224:
            raise ValueError(f"{self.name}: WWPN of {len(name)} bytes, limit 223")
        memset(&arg, 0, sizeof(arg))
        arg.abi_version = abi_version
        memcpy(<void *>arg.vhost_wwpn, <const char *>name, len(name))
        arg.vhost_tpgt = tpgt
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, f"target {wwpn}, ABI version {abi_version}")


cdef class ConfigRange(Ioctl):
    argument = "offset, bytes"

    def __call__(self, int fd, uint32_t offset, data):
        cdef int rc
        # An int reads so many bytes; bytes are written. vhost_vdpa_config and vduse_config_data are alike.
        cdef bint reads = isinstance(data, int)
        cdef bytes written = b"" if reads else bytes(data)
        cdef uint32_t size = data if reads else len(written)
        cdef vhost_vdpa_config *arg = <vhost_vdpa_config *>PyMem_Malloc(sizeof(vhost_vdpa_config) + size)
        if arg == NULL:
            raise MemoryError
        try:
            arg.off = offset
            arg.len = size
            memset(arg.buf, 0, size)
            memcpy(arg.buf, <const char *>written, len(written))
            rc = self.call(fd, arg)
            if rc < 0:
                self.fail(rc, f"{size} bytes at {offset}")
            return (<const char *>arg.buf)[:size] if reads else None
        finally:
            PyMem_Free(arg)


cdef class IovaRange(Ioctl):
    argument = "range"

    def __call__(self, int fd):
        cdef int rc
        cdef vhost_vdpa_iova_range arg
        memset(&arg, 0, sizeof(arg))
        rc = self.call(fd, &arg)
        if rc < 0:
            self.fail(rc, "")
        return arg.first, arg.last


# ---------------------------------------------------------------------- IOTLB messages


def iotlb_write(
    int fd, *, bint v2, uint32_t asid, uint8_t type, uint64_t iova, uint64_t size, uint64_t uaddr, uint8_t perm
):
    cdef vhost_msg_v2 message
    cdef ssize_t rc
    cdef int failed
    memset(&message, 0, sizeof(message))
    message.type = VHOST_IOTLB_MSG_V2 if v2 else VHOST_IOTLB_MSG
    message.asid = asid
    message.iotlb.iova = iova
    message.iotlb.size = size
    message.iotlb.uaddr = uaddr
    message.iotlb.perm = perm
    message.iotlb.type = type
    while True:
        with nogil:
            rc = write(fd, &message, sizeof(message))
            failed = errno
        if rc >= 0:
            return 0
        if failed != EINTR:
            return failed
        PyErr_CheckSignals()


def iotlb_read(int fd):
    cdef vhost_msg_v2 message
    cdef ssize_t rc
    with nogil:
        rc = read(fd, &message, sizeof(message))
    if rc < 0:
        if errno in (EAGAIN, EINTR):
            return None
        raise OSError(errno, f"reading IOTLB messages: {os.strerror(errno)}")
    if rc < <ssize_t>sizeof(message):
        return None
    return (
        message.iotlb.type, message.asid if message.type == VHOST_IOTLB_MSG_V2 else 0,
        message.iotlb.iova, message.iotlb.size, message.iotlb.uaddr, message.iotlb.perm,
    )
