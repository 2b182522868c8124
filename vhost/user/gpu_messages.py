# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The rows of the vhost-user-gpu protocol: what a GPU's back-end tells the front-end, its display, on the
socket that GPU_SET_SOCKET passes. Part of THE table, see messages.py."""

from __future__ import annotations

from enum import IntEnum

from vhost.features import GpuF
from vhost.user import gpu_payloads as g
from vhost.user.payloads import U64, Empty
from vhost.user.spec import FD_UNLESS_DISABLED, Policy, Role, Spec


class GpuMsg(IntEnum):
    """Requests of the back-end on the GPU socket."""

    GPU_GET_PROTOCOL_FEATURES = 1
    GPU_SET_PROTOCOL_FEATURES = 2
    GPU_GET_DISPLAY_INFO = 3
    GPU_CURSOR_POS = 4
    GPU_CURSOR_POS_HIDE = 5
    GPU_CURSOR_UPDATE = 6
    GPU_SCANOUT = 7
    GPU_UPDATE = 8
    GPU_DMABUF_SCANOUT = 9
    GPU_DMABUF_UPDATE = 10
    GPU_GET_EDID = 11
    GPU_DMABUF_SCANOUT2 = 12


_G = GpuMsg
_ALWAYS = Policy.ALWAYS


def _gpu(number: GpuMsg, doc: str, **columns: object) -> Spec:
    columns.setdefault("section", "Vhost-user-gpu Protocol")
    return Spec(
        name=number.name,
        id=int(number),
        sender=Role.BACKEND,
        doc=doc,
        **columns,  # type: ignore[arg-type]
    )


GPU: dict[int, Spec] = {row.id: row for row in (
    _gpu(_G.GPU_GET_PROTOCOL_FEATURES, "Which features of this protocol the display knows.",
         reply=U64, policy=_ALWAYS, names=(GpuF,)),
    _gpu(_G.GPU_SET_PROTOCOL_FEATURES, "Which of them are used.", request=U64, names=(GpuF,)),
    _gpu(_G.GPU_GET_DISPLAY_INFO, "The preferred mode of each scanout.",
         reply=g.GpuDisplayInfo, policy=_ALWAYS),
    _gpu(_G.GPU_CURSOR_POS, "Show the cursor here.", request=g.GpuCursorPos),
    _gpu(_G.GPU_CURSOR_POS_HIDE, "Hide the cursor.", request=g.GpuCursorPos),
    _gpu(_G.GPU_CURSOR_UPDATE, "The cursor's shape and place.", request=g.GpuCursorUpdate),
    _gpu(_G.GPU_SCANOUT, "The size of a scanout; 0 x 0 disables it.", request=g.GpuScanout),
    _gpu(_G.GPU_UPDATE, "Pixels of a part of a scanout; show them.", request=g.GpuUpdate),
    _gpu(_G.GPU_DMABUF_SCANOUT, "A scanout whose pixels are in a dma-buf; 0 x 0 disables it.",
         request=g.GpuDmabufScanout, fds=FD_UNLESS_DISABLED),
    _gpu(_G.GPU_DMABUF_UPDATE, "A part of the dma-buf changed; the reply comes when it was shown.",
         request=g.GpuArea, reply=Empty, policy=_ALWAYS),
    _gpu(_G.GPU_GET_EDID, "The EDID of a scanout.",
         request=g.GpuEdidRequest, reply=g.GpuEdid, policy=_ALWAYS, feature=GpuF.EDID),
    _gpu(_G.GPU_DMABUF_SCANOUT2, "GPU_DMABUF_SCANOUT with the dma-buf's modifiers.",
         request=g.GpuDmabufScanout2, fds=FD_UNLESS_DISABLED, feature=GpuF.DMABUF2),
)}  # fmt: skip
"""Requests on the GPU socket by id."""
