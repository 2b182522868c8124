# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy migration, as the destination's front-end leads it (vhost-user, "Migration").

    frontend = Frontend.connect(path, protocol_features=WANTED & ~ProtocolF.CONFIGURE_MEM_SLOTS)
    pages = frontend.postcopy_advise()       # a thread of its own serves it: faults(), place()
    frontend.postcopy_listen()
    frontend.set_mem_table(memory)           # and everything else that starts the device
    ...                                      # until each page was placed
    frontend.postcopy_end()

Pages come from wherever the caller has them, and in any order; a page that somebody waits for is worth being
first. Knows the phases, and whose address is whose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vhost.errors import (
    InactiveFeature,
    IncorrectFds,
    InvalidGuestMemory,
    InvalidMessage,
    InvalidState,
    ProtocolError,
)
from vhost.features import ProtocolF
from vhost.memory import Region
from vhost.user._userfault import PageFaults, place, wake
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import U64, MemTable

log = logging.getLogger("vhost.frontend")

FAULT = struct.Struct("=B7xQQ8x")
"""struct uffd_msg: event; flags and address of a fault, or the descriptor that reading of a fork makes."""
PAGEFAULT, FORK = 0x12, 0x13
FAULTS_PER_READ = 64


class Missing(NamedTuple):
    """A page that the back-end waits for."""

    region: Region
    offset: int
    """Of the page, in the region."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """A region that the back-end has mapped."""

    region: Region
    base: int  # where, in its process
    page: int
    alias: Region
    """A second mapping of ours, by which pages are placed: as a whole, so that nobody sees half of one."""


class PageServer:
    """Brings the pages of shared memory while the back-end uses it already. ``faults`` is for one thread,
    ``place`` for any. Whoever touches a page in this process before it was placed makes it an empty one."""

    def __init__(self, theirs: int) -> None:
        """The back-end's userfaultfd is this object's from now on."""
        try:
            self._ours = PageFaults()
        except BaseException:
            os.close(theirs)
            raise
        self._theirs = theirs
        self._known: tuple[_Known, ...] = ()

    def fileno(self) -> int:
        """Readable when ``faults`` has something."""
        return self._theirs

    def faults(self) -> list[Missing]:
        """The pages that the back-end waits for, and did not a call ago; does not wait."""
        data = memoryview(bytearray(FAULT.size * FAULTS_PER_READ))
        try:
            size = self._read(data)
        except BlockingIOError:
            return []
        found = []
        for event, what, address in FAULT.iter_unpack(data[:size]):
            if event == FORK:  # which nobody asked it to be told of
                os.close(what & 0xFFFFFFFF)
            elif event == PAGEFAULT and (missing := self._find(address)) is not None:
                found.append(missing)
        return found

    def _read(self, data: memoryview) -> int:
        # The back-end has the same open file, and may make it wait, or read what poll() saw, at any time.
        try:
            return os.preadv(self._theirs, [data], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # since Linux 6.10
                raise
            os.set_blocking(self._theirs, False)
            return os.readv(self._theirs, [data])

    def place(self, region: Region, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """These are the bytes at ``offset`` of the region, whole pages of its file; who waits for them goes
        on. False: something is there already, and stays. Pages may come before the region is shared."""
        size = memoryview(data).nbytes
        known = [known for known in self._known if known.region is region]
        if not known:
            known = [self._map(region, 0)]
        page = known[0].page
        if not 0 <= offset <= offset + size <= region.size or offset % page or size % page:
            raise ValueError(f"{size} bytes at {offset} of {region!r}: not in it, or not in pages of {page}")
        new = place(self._ours.fileno(), known[0].alias.host_addr + offset, data)
        for one in known:
            if one.base:
                wake(self._theirs, one.base + offset, size)
        return new

    def know(self, region: Region, base: int) -> None:
        """The back-end has mapped it at this address of its own."""
        self._map(region, base)

    def _map(self, region: Region, base: int) -> _Known:
        if region.fd < 0:
            raise InvalidGuestMemory(f"{region!r} has no descriptor to share")
        page = os.fstatvfs(region.fd).f_bsize
        if region.mmap_offset % page or region.size % page or base % page:
            raise InvalidGuestMemory(f"{region!r} at {base:#x} of the back-end: not in pages of {page}")
        if base:
            try:
                wake(self._theirs, base, region.size)  # nobody, but the kernel says whether it ever can
            except OSError as error:
                raise InvalidGuestMemory(
                    f"{region!r} at {base:#x} of the back-end: {error.strerror}"
                ) from error
        alias = next((known.alias for known in self._known if known.region is region), None)
        if alias is None:
            alias = Region.from_fd(
                region.fd,
                region.size,
                guest_addr=region.guest_addr,
                user_addr=region.user_addr,
                mmap_offset=region.mmap_offset,
            )
            self._ours.register(alias)
        known = _Known(region, base, page, alias)
        self._known += (known,)
        return known

    def _find(self, address: int) -> Missing | None:
        for known in self._known:
            if known.base and 0 <= address - known.base < known.region.size:
                return Missing(known.region, (address - known.base) // known.page * known.page)
        log.warning("post-copy: the back-end waits for %#x, which is in no region", address)
        return None

    def close(self) -> None:
        """What was not placed will be empty."""
        theirs, self._theirs = self._theirs, -1
        if theirs >= 0:
            os.close(theirs)
        self._ours.close()
        self._known = ()


class FrontendPostcopy(FrontendBase):
    """Needs protocol feature PAGEFAULT, and no CONFIGURE_MEM_SLOTS."""

    pages: PageServer | None = None
    """There from ``postcopy_advise`` to ``postcopy_end``."""

    def postcopy_advise(self) -> PageServer:
        """A migration is coming that may go on as post-copy. InactiveFeature if it cannot: with
        CONFIGURE_MEM_SLOTS the specification has none."""
        if self._has(ProtocolF.CONFIGURE_MEM_SLOTS):
            text = "connect without CONFIGURE_MEM_SLOTS for post-copy"
            raise InactiveFeature(text, request=F.POSTCOPY_ADVISE.name)
        if self.session.postcopy:
            raise InvalidState("post-copy is under way", request=F.POSTCOPY_ADVISE.name)
        reply = self._call(self.session.request(F.POSTCOPY_ADVISE))
        if reply is None:
            raise ProtocolError("the message table knows no reply", request=F.POSTCOPY_ADVISE.name)
        with contextlib.closing(reply):
            if not reply.fds:
                raise IncorrectFds("the back-end has no userfaultfd", request=F.POSTCOPY_ADVISE.name)
            link = os.readlink(f"/proc/self/fd/{reply.fds[0]}")
            if link != "anon_inode:[userfaultfd]":
                raise IncorrectFds(f"{link} is no userfaultfd", request=F.POSTCOPY_ADVISE.name)
            pages = PageServer(os.dup(reply.fds[0]))
        try:
            pages.faults()
        except OSError as error:
            pages.close()
            text = f"a userfaultfd that cannot be read: {error.strerror}"
            raise IncorrectFds(text, request=F.POSTCOPY_ADVISE.name) from error
        self._drop_pages()
        self.pages = pages
        return pages

    def postcopy_listen(self) -> None:
        """From now on memory that is shared comes page by page; before, none may have been shared."""
        if self.pages is None:
            raise InvalidState("was not advised", request=F.POSTCOPY_LISTEN.name)
        self._send(F.POSTCOPY_LISTEN)
        self.session.postcopy = True

    def postcopy_end(self) -> None:
        """All pages were placed."""
        status = self._get(F.POSTCOPY_END).value
        self.session.postcopy = False
        self._drop_pages()
        if status:
            raise ProtocolError(f"the back-end failed: status {status:#x}", request=F.POSTCOPY_END.name)

    def _share(self, table: MemTable, regions: Sequence[Region]) -> None:
        request = self.session.request(F.SET_MEM_TABLE, table, [region.fd for region in regions])
        reply = self._call(request)
        if reply is not None:
            reply.close()
        if not self.session.postcopy:
            return
        assert reply is not None and self.pages is not None
        got = reply.payload.regions
        if len(got) != len(regions):
            raise InvalidMessage(
                f"answer for {len(got)} regions, asked for {len(regions)}", request=request.name
            )
        for asked, answer in zip(table.regions, got, strict=True):
            if dataclasses.replace(answer, user_addr=asked.user_addr) != asked:
                raise InvalidMessage(f"answer for {answer}, asked for {asked}", request=request.name)
        for region, answer in zip(regions, got, strict=True):
            self.pages.know(region, answer.user_addr)
        # We know where the back-end has the new regions: it may touch them now.
        self._call(self.session.request(F.SET_MEM_TABLE, U64(0), need_reply=False))

    def _drop_pages(self) -> None:
        pages, self.pages = self.pages, None
        if pages is not None:
            pages.close()

    def close(self) -> None:
        self._drop_pages()
        super().close()
