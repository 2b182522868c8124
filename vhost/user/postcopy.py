# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Post-copy migration, as the destination's back-end serves it (vhost-user, "Migration").

The guest runs before all its memory is here. Whoever touches a page that is not waits in the kernel, by a
userfaultfd that the front-end has as well, until the front-end has put the page into the shared file.

What that means for threads: one without the GIL, as the block device's, waits for its page and for nothing
else. Whatever is done in Python waits with the GIL, and with it the whole process, all its sessions; so a
program that serves several guests, or a front-end that it does not trust, is better off without PAGEFAULT
(``without``). The requests served here touch no guest memory; starting a ring does, for its position. A
front-end that goes away ends all waiting, see csrc/userfault.h, at the price of the memory: so this is only
offered in a program that survives that (``vhost.memory.install_sigbus_handler``).

Knows the phases, and that new memory is used only when the front-end says so.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket

from vhost.devices.base import Device
from vhost.errors import InvalidState, UnsupportedRequest
from vhost.features import ProtocolF
from vhost.memory import GuestMemory, Region, has_sigbus_handler
from vhost.user._userfault import PageFaults
from vhost.user.handlers import Handlers
from vhost.user.payloads import EMPTY, U64, MemTable, SingleRegion
from vhost.user.session import Message
from vhost.user.spec import Answer

_PAGEFAULT = int(ProtocolF.PAGEFAULT)


@functools.cache
def _kernel_can() -> bool:
    try:
        PageFaults().close()
    except OSError:
        return False
    return True


class PostcopyHandlers(Handlers):
    def __init__(self, device: Device, sock: socket.socket, *, without: int = 0) -> None:
        self._faults: PageFaults | None = None
        """From ADVISE to END."""
        self._coming: GuestMemory | None = None
        """The memory that the front-end knows our addresses of, but has not acknowledged yet."""
        super().__init__(device, sock, without=without)

    def offered_protocol_features(self) -> int:
        possible = _kernel_can() and has_sigbus_handler()
        return super().offered_protocol_features() | (_PAGEFAULT if possible else 0)

    # -- phases ------------------------------------------------------------------------------------

    def postcopy_advise(self, message: Message) -> Answer:
        """A migration that was advised may fail, and another be advised in its place."""
        if self.session.postcopy:
            raise InvalidState("post-copy is under way", request=message.name)
        self._drop_faults()
        try:
            self._faults = PageFaults()
        except OSError as error:
            raise UnsupportedRequest(str(error), request=message.name) from error
        return Answer(EMPTY, (os.dup(self._faults.fileno()),))

    def postcopy_listen(self, message: Message) -> None:
        if self._faults is None or self.session.postcopy:
            raise InvalidState("was not advised, or is under way", request=message.name)
        if len(self.memory):
            # The front-end does not know our addresses of it, and so could not serve its faults.
            raise InvalidState(f"{len(self.memory)} regions were shared before", request=message.name)
        try:
            self._faults.guard(self.transport.fileno())
        except OSError as error:
            raise InvalidState(str(error), request=message.name) from error
        self.session.postcopy = True

    def postcopy_end(self, message: Message) -> U64:
        if self._faults is None:
            raise InvalidState("was not advised", request=message.name)
        missing, self._coming = self._coming, None
        self.session.postcopy = False
        try:
            self._faults.end()
        except OSError as error:
            raise InvalidState(str(error), request=message.name) from error
        finally:
            self._drop_faults()
        if missing is not None:
            raise InvalidState("the last memory was never acknowledged", request=message.name)
        return U64(0)

    def _drop_faults(self) -> None:
        faults, self._faults = self._faults, None
        if faults is not None:
            faults.close()

    # -- memory ------------------------------------------------------------------------------------

    def set_mem_table(self, message: Message) -> MemTable | None:
        if isinstance(message.payload, U64):
            self._use_coming(message)
            return None
        if not self.session.postcopy:
            super().set_mem_table(message)
            return None
        table: MemTable = message.payload
        regions = [self._map(*pair) for pair in zip(table.regions, message.fds, strict=True)]
        self._announce(GuestMemory(regions), regions)
        return MemTable(
            tuple(
                dataclasses.replace(region, user_addr=ours.host_addr)
                for region, ours in zip(table.regions, regions, strict=True)
            )
        )

    def add_mem_reg(self, message: Message) -> SingleRegion | None:
        if isinstance(message.payload, U64):
            self._use_coming(message)
            return None
        if not self.session.postcopy:
            super().add_mem_reg(message)
            return None
        region = message.payload.region
        ours = self._map(region, message.fds[0])
        self._announce((self.memory if self._coming is None else self._coming).add(ours), [ours])
        return SingleRegion(dataclasses.replace(region, user_addr=ours.host_addr))

    def rem_mem_reg(self, message: Message) -> None:
        if isinstance(message.payload, U64):
            self._use_coming(message)
        else:
            super().rem_mem_reg(message)

    def _announce(self, memory: GuestMemory, new: list[Region]) -> None:
        """Nothing of ours touches the new regions until ``_use_coming``, so that no fault comes before the
        front-end can serve it."""
        assert self._faults is not None
        for region in new:
            self._faults.register(region)
        self._coming = memory

    def _use_coming(self, message: Message) -> None:
        """The front-end's acknowledgement. QEMU sends it also when it only removed regions, or none."""
        if message.payload.value:
            raise InvalidState(f"the front-end failed: {message.payload.value:#x}", request=message.name)
        memory, self._coming = self._coming, None
        if memory is not None:
            self.replace_memory(memory)

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        if self._faults is not None and not self.closed:
            # First: a thread of the device may wait for a page, and its rings are about to be stopped.
            self._faults.abandon()
        super().close()

    def _let_go(self) -> None:
        self._drop_faults()
        super()._let_go()
