# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU's command line for a Debian kernel under TCG: console into a file, a socket for the second
serial port.

Knows the machine that every guest of ours is. Does not know what runs in it.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from peers.kernels import Kernel

# panic=-1 restarts at once, and -no-reboot makes QEMU end instead.
_APPEND = (
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr random.trust_cpu=on "
    "cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=2"
)


class Qemu:
    """A running QEMU. ``command`` is our end of the guest's ttyS1. ``incoming``: it waits for a migration."""

    def __init__(
        self,
        kernel: Kernel,
        initramfs: Path,
        devices: Sequence[str],
        folder: Path,
        *,
        cpus: int,
        memory_mib: int,
        append: str = "",
        monitor: socket.socket | None = None,
        incoming: bool = False,
    ) -> None:
        self._logs = [folder / "console.log", folder / "qemu.log"]
        self.command, command = socket.socketpair()
        descriptors = [command.fileno()]
        arguments = [
            "qemu-system-x86_64",
            *("-M", "q35,memory-backend=m0", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-object", f"memory-backend-memfd,id=m0,size={memory_mib}M,share=on"),
            *("-m", f"{memory_mib}M", "-smp", str(cpus)),
            *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
            *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", f"{_APPEND} {append}"),
            *("-chardev", f"file,id=console,path={self._logs[0]}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=command,fd={command.fileno()}", "-serial", "chardev:command"),
            *devices,
        ]
        if incoming:
            arguments += ["-incoming", "defer"]
        if monitor is not None:
            descriptors.append(monitor.fileno())
            arguments += ["-chardev", f"socket,id=monitor,fd={monitor.fileno()}"]
            arguments += ["-mon", "chardev=monitor,mode=control"]
        with command, self._logs[1].open("wb") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=descriptors
            )

    def console(self) -> str:
        """What the kernel and init wrote so far."""
        path = self._logs[0]
        return path.read_text(errors="replace") if path.exists() else ""

    def log(self) -> str:
        """The ends of the kernel's console and of QEMU's messages, for people."""
        parts = []
        for path in self._logs:
            text = path.read_text(errors="replace") if path.exists() else ""
            parts.append(f"--- {path.name}\n{text[-3000:]}")
        return "\n".join(parts)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.command.close()
