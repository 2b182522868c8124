# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy migration, as the destination's front-end leads it (vhost-user, "Migration").

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
import logging
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vhost.errors import IncorrectFds, InvalidGuestMemory, InvalidMessage, InvalidState, ProtocolError
from vhost.memory import Region
from vhost.user._userfault import PageFaults, place, wake
from vhost.user.frontend_base import FrontendBase
from vhost.user.messages import FrontendMsg as F
from vhost.user.payloads import U64, MemoryRegion, MemTable, SingleRegion

log = logging.getLogger("vhost.frontend")

FAULT = struct.Struct("=B7xQQ8x")
"""struct uffd_msg: event, flags, address."""
PAGEFAULT = 0x12
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
        # The back-end has the same open file, and may have made it wait: then even poll() has an event.
        os.set_blocking(self._theirs, False)
        try:
            data = os.read(self._theirs, FAULT.size * FAULTS_PER_READ)
        except BlockingIOError:
            return []
        found = (self._find(address) for event, _, address in FAULT.iter_unpack(data) if event == PAGEFAULT)
        return [missing for missing in found if missing is not None]

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
        if base + region.size > 1 << 64:
            raise InvalidGuestMemory(f"{region!r} at {base:#x} of the back-end: ends beyond all addresses")
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
    """Needs protocol feature PAGEFAULT."""

    pages: PageServer | None = None
    """There from ``postcopy_advise`` to ``postcopy_end``."""

    def postcopy_advise(self) -> PageServer:
        """A migration is coming that may go on as post-copy."""
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
            self._drop_pages()
            pages = PageServer(os.dup(reply.fds[0]))
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

    def _share(self, number: F, payload: MemTable | SingleRegion, regions: Sequence[Region]) -> None:
        fds = [region.fd for region in regions]
        if not self.session.postcopy:
            self._send(number, payload, fds)
            return
        assert self.pages is not None
        reply = self._call(self.session.request(number, payload, fds))
        if reply is None:
            raise ProtocolError("the message table knows no reply", request=number.name)
        reply.close()
        for asked, got, region in zip(_rows(payload), _rows(reply.payload), regions, strict=False):
            if dataclasses.replace(got, user_addr=asked.user_addr) != asked:
                raise InvalidMessage(f"answer for {got}, asked for {asked}", request=number.name)
            self.pages.know(region, got.user_addr)
        if len(_rows(reply.payload)) != len(regions):
            raise InvalidMessage(
                f"answer for {len(_rows(reply.payload))} regions, asked for {len(regions)}",
                request=number.name,
            )

    def _acknowledge(self, number: F) -> None:
        """We know where the back-end has the new regions: it may touch them now."""
        if self.session.postcopy:
            self._call(self.session.request(number, U64(0), need_reply=False))

    def _drop_pages(self) -> None:
        pages, self.pages = self.pages, None
        if pages is not None:
            pages.close()

    def close(self) -> None:
        self._drop_pages()
        super().close()


def _rows(payload: MemTable | SingleRegion) -> tuple[MemoryRegion, ...]:
    return payload.regions if isinstance(payload, MemTable) else (payload.region,)
