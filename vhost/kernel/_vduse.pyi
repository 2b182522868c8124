# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""VDUSE's ioctls as callables, and the messages of /dev/vduse/NAME. Failures raise IoctlError."""

from typing import Final, NamedTuple

from vhost.kernel._ioctl import Ioctl

GET_VQ_STATE: Final[int]
SET_STATUS: Final[int]
UPDATE_IOTLB: Final[int]
SET_VQ_GROUP_ASID: Final[int]

class Request(NamedTuple):
    """What the kernel asks of a device; fields that its type has no use for are 0."""

    type: int
    id: int
    ring: int
    status: int
    start: int
    last: int
    asid: int
    group: int

class CreateDev(Ioctl):
    def __call__(
        self,
        fd: int,
        name: str,
        /,
        *,
        device_id: int,
        features: int,
        vq_num: int,
        config: bytes,
        vendor_id: int = 0,
        vq_align: int = 4096,
        ngroups: int = 0,
        nas: int = 0,
    ) -> None: ...

class DestroyDev(Ioctl):
    def __call__(self, fd: int, name: str, /) -> None: ...

class VqConfig(Ioctl):
    def __call__(self, fd: int, index: int, max_size: int, /, *, group: int = 0) -> None: ...

class VqInfo(Ioctl):
    def __call__(self, fd: int, index: int, /, *, packed: bool) -> tuple[int, int, int, int, int, bool]:
        """Size, IOVA of the descriptor, driver and device area, base as in SET_VRING_BASE, ready."""

class IotlbFd(Ioctl):
    def __call__(self, fd: int, start: int, last: int, /, *, asid: int = 0) -> tuple[int, int, int, int, int]:
        """A new descriptor, which is the caller's; offset in its file; first and last IOVA; access (1 to
        read, 2 to write, 3 both)."""

class Umem(Ioctl):
    def __call__(self, fd: int, iova: int, size: int, uaddr: int = 0, /, *, asid: int = 0) -> None: ...

class IovaInfo(Ioctl):
    def __call__(self, fd: int, start: int, last: int, /, *, asid: int = 0) -> tuple[int, int, int]:
        """First and last IOVA, capabilities."""

def read_request(fd: int) -> Request | None:
    """The next request; None: there is none now."""

def write_response(
    fd: int, request_id: int, ok: bool, *, index: int = 0, base: int | None = None, packed: bool = False
) -> None:
    """Answer a request; ``base`` (as in GET_VRING_BASE) for GET_VQ_STATE."""
