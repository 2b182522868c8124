# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""csrc/userfault_uapi.h against the kernel's linux/userfaultfd.h: each number, size and offset."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from peers.catalogue import KERNEL_HEADERS
from peers.support import require
from vhost.user.frontend_postcopy import FAULT, PAGEFAULT

ROOT = Path(__file__).resolve().parent.parent

_NUMBERS = """
    UFFD_API UFFD_FEATURE_MISSING_HUGETLBFS UFFD_FEATURE_MISSING_SHMEM UFFDIO_REGISTER_MODE_MISSING
    UFFD_EVENT_PAGEFAULT UFFD_PAGEFAULT_FLAG_WRITE _UFFDIO_REGISTER _UFFDIO_UNREGISTER _UFFDIO_WAKE
    _UFFDIO_COPY _UFFDIO_API UFFDIO UFFDIO_API UFFDIO_REGISTER UFFDIO_UNREGISTER UFFDIO_WAKE UFFDIO_COPY
    USERFAULTFD_IOC USERFAULTFD_IOC_NEW
"""
STRUCTS = {
    "uffdio_api": "api features ioctls",
    "uffdio_range": "start len",
    "uffdio_register": "range mode ioctls",
    "uffdio_copy": "dst src len mode copy",
    "uffd_msg": "event reserved1 reserved2 reserved3 arg arg.pagefault.flags arg.pagefault.address",
}


def facts(folder: Path, header: str, *options: str) -> dict[str, int]:
    shown = {name: name for name in _NUMBERS.split()}
    for struct, fields in STRUCTS.items():
        shown[struct] = f"sizeof(struct {struct})"
        for field in fields.split():
            shown[f"{struct}.{field}"] = f"offsetof(struct {struct}, {field})"
    lines = [f'printf("{name} %llu\\n", (unsigned long long)({value}));' for name, value in shown.items()]
    source = folder / "facts.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include {header}\n"
        + "int main(void)\n{\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    program = folder / "facts"
    subprocess.run(["gcc", "-Wall", "-Werror", *options, "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def ours(folder: Path) -> dict[str, int]:
    require("gcc")
    return facts(folder, '"userfault_uapi.h"', f"-I{ROOT / 'csrc'}")


@pytest.mark.parametrize("which", ["installed", "newest"])
def test_every_number_size_and_offset(which: str, tmp_path: Path) -> None:
    options = []
    if which == "newest":
        require("kernel-headers")
        options = ["-isystem", str(KERNEL_HEADERS / "usr" / "include")]
    theirs = facts(tmp_path, "<linux/userfaultfd.h>", *options)
    assert ours(tmp_path) == theirs


def test_the_message_in_python(tmp_path: Path) -> None:
    known = ours(tmp_path)
    assert known["UFFD_EVENT_PAGEFAULT"] == PAGEFAULT
    assert known["uffd_msg"] == FAULT.size
    at = bytes(range(FAULT.size))
    event, flags, address = FAULT.unpack(at)
    assert event == at[known["uffd_msg.event"]]
    assert flags.to_bytes(8, "little")[0] == at[known["uffd_msg.arg.pagefault.flags"]]
    assert address.to_bytes(8, "little")[0] == at[known["uffd_msg.arg.pagefault.address"]]
