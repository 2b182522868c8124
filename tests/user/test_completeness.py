# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""No message of the specification is missing, in neither role.

The names and numbers are written down here once more, from the specification's text. That a message is sent
and served somewhere is read from the sources; that it works is in the tests of its area.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import vhost.user
from vhost.user.backend import Backend
from vhost.user.frontend import Frontend
from vhost.user.gpu import GpuDisplay
from vhost.user.messages import BACKEND, FRONTEND, GPU, table_rows
from vhost.user.spec import Spec


def names_of(text: str) -> list[str]:
    return text.split()


# In the order of their ids, from 1 on (vhost-user, "Front-end message types").
FRONTEND_MESSAGES = names_of("""
    GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE SET_LOG_FD
    SET_VRING_NUM SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR
    GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU
    SET_BACKEND_REQ_FD IOTLB_MSG SET_VRING_ENDIAN GET_CONFIG SET_CONFIG CREATE_CRYPTO_SESSION
    CLOSE_CRYPTO_SESSION POSTCOPY_ADVISE POSTCOPY_LISTEN POSTCOPY_END GET_INFLIGHT_FD SET_INFLIGHT_FD
    GPU_SET_SOCKET RESET_DEVICE VRING_KICK GET_MAX_MEM_SLOTS ADD_MEM_REG REM_MEM_REG SET_STATUS GET_STATUS
    GET_SHARED_OBJECT SET_DEVICE_STATE_FD CHECK_DEVICE_STATE GET_SHMEM_CONFIG GET_VRING_BASE_SKIP_DRAIN""")
# "Back-end message types", each after VHOST_USER_.
BACKEND_MESSAGES = names_of("""
    BACKEND_IOTLB_MSG BACKEND_CONFIG_CHANGE_MSG BACKEND_VRING_HOST_NOTIFIER_MSG
    BACKEND_VRING_CALL BACKEND_VRING_ERR BACKEND_SHARED_OBJECT_ADD BACKEND_SHARED_OBJECT_REMOVE
    BACKEND_SHARED_OBJECT_LOOKUP BACKEND_SHMEM_MAP BACKEND_SHMEM_UNMAP""")
# vhost-user-gpu, "Message types".
GPU_MESSAGES = names_of("""
    GPU_GET_PROTOCOL_FEATURES GPU_SET_PROTOCOL_FEATURES GPU_GET_DISPLAY_INFO GPU_CURSOR_POS
    GPU_CURSOR_POS_HIDE GPU_CURSOR_UPDATE GPU_SCANOUT GPU_UPDATE GPU_DMABUF_SCANOUT GPU_DMABUF_UPDATE
    GPU_GET_EDID GPU_DMABUF_SCANOUT2""")

SOURCES = Path(vhost.user.__file__).parent


@functools.cache
def named_in(*enums: str, front: bool) -> set[str]:
    """Members of these enums that the sources of one role speak of."""
    found = set()
    for path in SOURCES.glob("*.py"):
        if path.name.startswith("frontend") is front and not path.name.endswith("messages.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                owner = node.value if isinstance(node, ast.Attribute) else None
                if isinstance(owner, ast.Name) and owner.id in enums:
                    found.add(node.attr)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("rows", "names"),
    [(FRONTEND, FRONTEND_MESSAGES), (BACKEND, BACKEND_MESSAGES), (GPU, GPU_MESSAGES)],
    ids=["front-end", "back-end", "gpu"],
)
def test_the_table_is_the_specification(rows: dict[int, Spec], names: list[str]) -> None:
    assert {number: row.name for number, row in rows.items()} == dict(enumerate(names, 1))


def test_the_command_line_shows_all() -> None:
    assert [row["name"] for row in table_rows()] == [*FRONTEND_MESSAGES, *BACKEND_MESSAGES, *GPU_MESSAGES]


@pytest.mark.parametrize("row", FRONTEND.values(), ids=lambda row: row.name)
def test_requests_of_the_front_end(row: Spec) -> None:
    assert callable(getattr(Backend, row.handler, None)), "the back-end serves it"
    assert row.name in named_in("F", "FrontendMsg", front=True), "the front-end sends it"


@pytest.mark.parametrize("row", BACKEND.values(), ids=lambda row: row.name)
def test_requests_of_the_back_end(row: Spec) -> None:
    assert callable(getattr(Frontend, f"_serve_{row.handler}", None)), "the front-end serves it"
    assert row.name in named_in("BackendMsg", front=False), "the back-end sends it"


@pytest.mark.parametrize("row", GPU.values(), ids=lambda row: row.name)
def test_requests_on_the_gpu_socket(row: Spec) -> None:
    assert callable(getattr(GpuDisplay, row.handler, None)), "the display serves it"
    assert row.name in named_in("GpuMsg", front=False), "the device's end sends it"
