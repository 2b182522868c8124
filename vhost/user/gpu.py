# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user-gpu protocol: what a GPU device shows, on the socket of GPU_SET_SOCKET.

``GpuChannel`` is the device's end, ``GpuDisplay`` the front-end's. Neither ever waits: poll ``fileno()``, for
writing too while ``pending``, and call ``step()``. Knows messages, and nothing of how pixels get anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from vhost.errors import Disconnected, InvalidMessage, ProtocolError
from vhost.features import GpuF
from vhost.user.channel import BackendChannel
from vhost.user.gpu_messages import GpuMsg
from vhost.user.gpu_payloads import (
    MAX_SCANOUTS,
    UPDATE_MAX,
    GpuArea,
    GpuCursorPos,
    GpuCursorUpdate,
    GpuDisplayInfo,
    GpuDmabufScanout,
    GpuDmabufScanout2,
    GpuEdid,
    GpuEdidRequest,
    GpuScanout,
    GpuUpdate,
    Mode,
)
from vhost.user.payloads import EMPTY, U64, Empty
from vhost.user.session import Channel, Message, Role, Session
from vhost.user.transport import Transport

__all__ = ["GpuChannel", "GpuDisplay", "Mode"]

log = logging.getLogger("vhost.gpu")

KNOWN = int(GpuF.EDID | GpuF.DMABUF2)
MESSAGES_PER_STEP = 16


class GpuChannel(BackendChannel):
    """The device's end: a device gets the socket in ``set_gpu_socket`` and returns this. It asks for the
    display's features by itself; ``features`` is None until it knows. Descriptors stay the caller's."""

    def __init__(self, sock: socket.socket) -> None:
        session = Session(Role.BACKEND, Channel.GPU)
        super().__init__(Transport(sock, session, max_pending=2 * UPDATE_MAX))
        self.features: int | None = None
        self.request(GpuMsg.GPU_GET_PROTOCOL_FEATURES, then=self._negotiate)

    def _negotiate(self, answer: Message | None) -> None:
        if answer is not None:
            self.features = self.session.protocol_features = answer.payload.value & KNOWN
            self.request(GpuMsg.GPU_SET_PROTOCOL_FEATURES, U64(self.features))

    def get_display_info(self, then: Callable[[Sequence[Mode] | None], None]) -> None:
        """The preferred mode of each scanout, from a later step; None: the display is gone."""
        self.request(
            GpuMsg.GPU_GET_DISPLAY_INFO,
            then=lambda answer: then(None if answer is None else answer.payload.modes),
        )

    def get_edid(self, scanout: int, then: Callable[[bytes | None], None]) -> None:
        """Raises InactiveFeature if the display has none to give."""
        self.request(
            GpuMsg.GPU_GET_EDID,
            GpuEdidRequest(scanout),
            then=lambda answer: then(None if answer is None else answer.payload.edid),
        )

    def cursor_pos(self, scanout: int, x: int, y: int) -> None:
        self.request(GpuMsg.GPU_CURSOR_POS, GpuCursorPos(scanout, x, y))

    def cursor_pos_hide(self, scanout: int, x: int, y: int) -> None:
        self.request(GpuMsg.GPU_CURSOR_POS_HIDE, GpuCursorPos(scanout, x, y))

    def cursor_update(self, scanout: int, x: int, y: int, hot_x: int, hot_y: int, pixels: bytes) -> None:
        """``pixels``: 64 x 64 of a8r8g8b8."""
        self.request(GpuMsg.GPU_CURSOR_UPDATE, GpuCursorUpdate(scanout, x, y, hot_x, hot_y, pixels))

    def scanout(self, scanout: int, width: int, height: int) -> None:
        self.request(GpuMsg.GPU_SCANOUT, GpuScanout(scanout, width, height))

    def update(self, scanout: int, x: int, y: int, width: int, height: int, pixels: bytes) -> None:
        """``pixels``: x8r8g8b8, line by line. ProtocolError ends the channel if the display does not
        read for longer than it takes to fill 256 MiB: look at ``pending``."""
        self.request(GpuMsg.GPU_UPDATE, GpuUpdate(scanout, x, y, width, height, pixels))

    def dmabuf_scanout(self, scanout: GpuDmabufScanout | GpuDmabufScanout2, fd: int | None) -> None:
        """``fd`` None: disable the scanout, whose size then has to be 0 x 0."""
        number = GpuMsg.GPU_DMABUF_SCANOUT
        if isinstance(scanout, GpuDmabufScanout2):
            number = GpuMsg.GPU_DMABUF_SCANOUT2
        self.request(number, scanout, [] if fd is None else [fd])

    def dmabuf_update(self, area: GpuArea, then: Callable[[bool], None]) -> None:
        """``then(True)`` once it was shown, and the buffer may change again; False: the display is gone."""
        self.request(GpuMsg.GPU_DMABUF_UPDATE, area, then=lambda answer: then(answer is not None))


class GpuDisplay:
    """The front-end's end. A subclass shows things; give the other end of the socket to
    ``Frontend.gpu_set_socket``. Whoever breaks the protocol is disconnected: ``error`` says why."""

    def __init__(self, sock: socket.socket, *, features: int = KNOWN) -> None:
        self.session = Session(Role.FRONTEND, Channel.GPU)
        self.transport = Transport(sock, self.session)
        self.offered = features
        self.error: ProtocolError | None = None

    # -- what a subclass may say -------------------------------------------------------------------

    def display_info(self) -> Sequence[Mode]:
        """The preferred mode of each scanout, at most 16."""
        return (Mode(width=1024, height=768, enabled=1),)

    def edid(self, scanout: int) -> bytes:
        return b""

    def cursor_moved(self, scanout: int, x: int, y: int, visible: bool) -> None:
        """The cursor is here now."""

    def cursor_changed(self, cursor: GpuCursorUpdate) -> None:
        """The cursor looks like this now."""

    def scanout_changed(self, scanout: int, width: int, height: int) -> None:
        """0 x 0: it shows nothing any more."""

    def updated(self, update: GpuUpdate) -> None:
        """New pixels."""

    def dmabuf_changed(self, scanout: GpuDmabufScanout | GpuDmabufScanout2, fd: int | None) -> None:
        """The scanout is in this dma-buf from now on; os.dup it to keep it. None: it is disabled."""

    def dmabuf_updated(self, area: GpuArea) -> None:
        """Show it before returning: the device may draw into the buffer again then."""

    # -- the loop ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self.transport.fileno()

    @property
    def pending(self) -> bool:
        return self.transport.pending > 0

    def step(self) -> bool:
        """Serve what the device sent. False once it is over."""
        if self.error is not None:
            return False
        try:
            self.transport.flush()
            for _ in range(MESSAGES_PER_STEP):
                message = self.transport.receive()
                if message is None:
                    break
                with contextlib.closing(message):
                    self._serve(message)
        except ProtocolError as error:
            if error.message is not None:
                error.message.close()
            level = logging.DEBUG if isinstance(error, Disconnected) else logging.WARNING
            log.log(level, "GPU socket ends: %s", str(error))
            self.error = error.with_traceback(None)
        return self.error is None

    def _serve(self, message: Message) -> None:
        log.debug("%s", message)
        answer = getattr(self, message.spec.handler)(message)
        if answer is not None:
            self.transport.send(self.session.reply(message, answer))

    def close(self) -> None:
        """Idempotent."""
        if self.error is None:
            self.error = Disconnected("closed")
        self.transport.close()

    # -- requests of the device, named as the rows' handlers ---------------------------------------

    def gpu_get_protocol_features(self, message: Message) -> U64:
        return U64(self.offered)

    def gpu_set_protocol_features(self, message: Message) -> None:
        features = message.payload.value
        if features & ~self.offered:
            raise InvalidMessage(
                f"features {features:#x}, offered were {self.offered:#x}", request=message.name
            )
        self.session.protocol_features = features

    def gpu_get_display_info(self, message: Message) -> GpuDisplayInfo:
        return GpuDisplayInfo(tuple(self.display_info()))

    def gpu_get_edid(self, message: Message) -> GpuEdid:
        return GpuEdid(self.edid(_scanout(message)))

    def gpu_cursor_pos(self, message: Message) -> None:
        self.cursor_moved(_scanout(message), message.payload.x, message.payload.y, True)

    def gpu_cursor_pos_hide(self, message: Message) -> None:
        self.cursor_moved(_scanout(message), message.payload.x, message.payload.y, False)

    def gpu_cursor_update(self, message: Message) -> None:
        _scanout(message)
        self.cursor_changed(message.payload)

    def gpu_scanout(self, message: Message) -> None:
        self.scanout_changed(_scanout(message), message.payload.width, message.payload.height)

    def gpu_update(self, message: Message) -> None:
        _scanout(message)
        self.updated(message.payload)

    def gpu_dmabuf_scanout(self, message: Message) -> None:
        _scanout(message)
        self.dmabuf_changed(message.payload, message.fds[0] if message.fds else None)

    def gpu_dmabuf_scanout2(self, message: Message) -> None:
        self.gpu_dmabuf_scanout(message)

    def gpu_dmabuf_update(self, message: Message) -> Empty:
        _scanout(message)
        self.dmabuf_updated(message.payload)
        return EMPTY


def _scanout(message: Message) -> int:
    scanout: int = message.payload.scanout
    if scanout >= MAX_SCANOUTS:
        raise InvalidMessage(f"scanout {scanout}, must be below {MAX_SCANOUTS}", request=message.name)
    return scanout
