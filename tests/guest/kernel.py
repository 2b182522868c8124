#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Run pytest, or any command, on a Debian kernel with vhost, under QEMU.

    .venv/bin/python tests/guest/kernel.py --kernel 6.12 tests/kernel/test_net.py -k name
    .venv/bin/python tests/guest/kernel.py --kernel 6.12 --shell 'ls -l /dev/vhost*'
    .venv/bin/python tests/guest/kernel.py --list

The guest sees the host's file system read-only, so this worktree's build and virtual environment run
in it as they are; /tmp, /run, /var/tmp and /dev/shm are its own. It is root there, and nothing that
it does reaches the host but what it writes to the share, /run/pyvhost.

Knows what ``kernel_init`` expects on the share. Does not know what the tests test.
"""

from __future__ import annotations

import argparse
import codecs
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # else tests/ is in the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from guest.image import build_initramfs
from guest.qemu import Qemu
from peers.kernels import CACHE, KERNELS, REPOSITORY, Kernel

SHARE = "/run/pyvhost"
# tmpfs in the guest; what is needed from below them is named to its init.
_HIDDEN = tuple(map(Path, ("/tmp", "/run", "/var/tmp", "/dev/shm")))
_END = b"\001END "
TIMEOUT = 900.0


@dataclass(frozen=True)
class Outcome:
    """``code`` is the command's exit code; None: it did not end, and ``problem`` says why."""

    code: int | None
    problem: str
    output: str
    console: str
    junit: str
    seconds: float


def pytest_command(arguments: Sequence[str]) -> str:
    return shlex.join(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--color=no"),
            f"--junitxml={SHARE}/junit.xml",
            *(arguments or ["tests/kernel"]),
        ]
    )


def run_in_kernel(
    kernel: Kernel,
    command: str,
    *,
    timeout: float = TIMEOUT,
    live: Callable[[str], object] = lambda text: None,
    cpus: int = 2,
    memory_mib: int = 1024,
) -> Outcome:
    """Boot, run a line of shell in the repository, and end; never takes longer than ``timeout``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyvhost-guest-") as name:
        folder, share = Path(name), Path(name) / "share"
        share.mkdir()
        _fill(share, kernel, command)
        initramfs = build_initramfs(
            folder / "initramfs.cpio", [], kernel=kernel, init=Path(__file__).with_name("kernel_init")
        )
        qemu = Qemu(
            kernel,
            initramfs,
            _file_systems(share),
            folder,
            cpus=cpus,
            memory_mib=memory_mib,
            append="oops=panic",
        )
        try:
            output, problem = _follow(qemu, start + timeout, live)
        finally:
            qemu.close()
        rc, junit = share / "rc", share / "junit.xml"
        return Outcome(
            code=int(rc.read_text()) if not problem else None,
            problem=problem,
            output=output,
            console=qemu.console(),
            junit=junit.read_text() if junit.exists() else "",
            seconds=time.monotonic() - start,
        )


def _fill(share: Path, kernel: Kernel, command: str) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "PYVHOST_GUEST": kernel.name,
        "PYVHOST_CACHE": str(CACHE),
        **{name: os.environ[name] for name in ("CI",) if name in os.environ},
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    (share / "command").write_text(f"{exports}cd {shlex.quote(str(REPOSITORY))} || exit 1\n{command}\n")
    (share / "modules").write_text("".join(f"{path}\n" for path in kernel.modules("run")))
    needed = {REPOSITORY, CACHE, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    hidden = [path for path in needed if any(path.is_relative_to(folder) for folder in _HIDDEN)]
    (share / "visible").write_text("".join(f"{path}\n" for path in sorted(hidden)))


def _file_systems(share: Path) -> list[str]:
    # QEMU refuses a comma in a path unless it is doubled.
    path = str(share).replace(",", ",,")
    return [
        *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-fsdev", f"local,id=share,path={path},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=share,mount_tag=share"),
        *("-device", "virtio-rng-pci"),
    ]


def _follow(qemu: Qemu, deadline: float, live: Callable[[str], object]) -> tuple[str, str]:
    """(the command's output, why it did not end or "")."""
    received = b""
    shown = 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def gave_up(problem: str) -> tuple[str, str]:
        return received.decode(errors="replace"), f"{problem}\n{qemu.log()}"

    while True:
        output, end, code = received.partition(_END)
        # The mark may have come in part; nothing else begins with its first byte.
        ready = output if end else output.partition(_END[:1])[0]
        live(decoder.decode(ready[shown:]))
        shown = len(ready)
        if b"\n" in code:
            return output.decode(errors="replace"), ""
        left = deadline - time.monotonic()
        if left <= 0:
            return gave_up("the command did not end in time")
        qemu.command.settimeout(left)
        try:
            data = qemu.command.recv(65536)
        except TimeoutError:
            continue
        except ConnectionResetError:
            data = b""
        if not data:
            return gave_up(f"the guest went down; QEMU's exit code is {qemu.process.wait()}")
        received += data


def find(name: str) -> Kernel:
    """By its name here, or by the start of its release."""
    for kernel in KERNELS.values():
        if kernel.name == name or (not kernel.missing() and kernel.release.startswith(name)):
            return kernel
    raise SystemExit(f"no kernel {name}: there are {', '.join(KERNELS)} (make peers)")


def _list() -> None:
    for kernel in KERNELS.values():
        state = kernel.missing() or kernel.release
        print(f"{kernel.name:8} {state:24} {' '.join(kernel.facilities)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kernel", default="6.12", help="its name or the start of its release")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for all of it")
    parser.add_argument("--shell", help="run this instead of pytest")
    parser.add_argument("--console", action="store_true", help="also show the kernel's messages")
    parser.add_argument("--list", action="store_true", help="show the kernels")
    options, arguments = parser.parse_known_args()
    if options.list:
        _list()
        return 0
    kernel = find(options.kernel)
    if kernel.missing():
        raise SystemExit(f"kernel {kernel.name}: {kernel.missing()} (make peers)")

    def live(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    outcome = run_in_kernel(
        kernel, options.shell or pytest_command(arguments), timeout=options.timeout, live=live
    )
    if options.console:
        print(f"--- console\n{outcome.console}")
    print(f"--- {kernel.release}: {outcome.problem or f'exit {outcome.code}'}, {outcome.seconds:.0f} s")
    return 1 if outcome.code is None else outcome.code


if __name__ == "__main__":
    sys.exit(main())
