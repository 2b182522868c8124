# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A Linux guest under QEMU: boots on vhost-user sockets, runs shell commands, resets, dies.

Knows QEMU's vhost-user devices and the command channel that ``guest/init`` serves. Does not know which
back-end is behind the sockets, nor pytest.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from guest.qemu import Qemu
from guest.qmp import Qmp
from peers.kernels import CLOUD

# Under TCG the tests are slow by nature; a deadline only has to tell slow from stuck.
BOOT_SECONDS = 60.0
COMMAND_SECONDS = 120.0


class GuestError(Exception):
    """The guest died, hung, or a command in it failed; carries the ends of its logs."""


@dataclass(frozen=True)
class Output:
    code: int
    text: str


def vhost_user_blk(
    path: Path,
    *,
    queues: int = 1,
    packed: bool = False,
    queue_size: int = 128,
    reconnect_ms: int = 0,
    iommu: bool = False,
    name: str = "disk",
    bus: str = "",
) -> list[str]:
    """``iommu``: behind a virtual IOMMU, with an IOTLB of its own (PCI's ATS)."""
    reconnect = f",reconnect-ms={reconnect_ms}" if reconnect_ms else ""
    ring = f",packed={'on' if packed else 'off'},queue-size={queue_size},num-queues={queues}"
    ring += f",bus={bus}" if bus else ""
    before: tuple[str, ...] = ()
    if iommu:
        # The IOMMU comes before what is behind it. ATS is an extended capability, which a device directly
        # on the root complex does not show.
        before = ("-device", "intel-iommu,intremap=off,device-iotlb=on")
        before += ("-device", f"pcie-root-port,id=port-{name},chassis=1")
        ring += f",bus=port-{name},disable-legacy=on,iommu_platform=on,ats=on"
    return [
        *before,
        *("-chardev", f"socket,id=c-{name},path={path}{reconnect}"),
        *("-device", f"vhost-user-blk-pci,id={name},chardev=c-{name}{ring}"),
    ]


def vhost_user_rng(path: Path, *, name: str = "rng") -> list[str]:
    return [
        *("-chardev", f"socket,id=c-{name},path={path}"),
        *("-device", f"vhost-user-rng-pci,id={name},chardev=c-{name}"),
    ]


def vhost_user_fs(path: Path, *, tag: str = "test", name: str = "fs") -> list[str]:
    return [
        *("-chardev", f"socket,id=c-{name},path={path}"),
        *("-device", f"vhost-user-fs-pci,id={name},chardev=c-{name},tag={tag}"),
    ]


def vhost_user_net(
    path: Path, *, mac: str, pairs: int = 1, packed: bool = False, legacy: bool = False, more: str = ""
) -> list[str]:
    """``legacy``: without VERSION_1. ``more``: properties of the device."""
    device = f"virtio-net-pci,netdev=n0,mac={mac},romfile=,packed={'on' if packed else 'off'}"
    if pairs > 1:
        device += f",mq=on,vectors={2 * pairs + 2}"
    if legacy:
        device += ",disable-modern=on,disable-legacy=off"
    return [
        *("-chardev", f"socket,id=c-net,path={path}"),
        *("-netdev", f"vhost-user,id=n0,chardev=c-net,queues={pairs}"),
        *("-device", device + more),
    ]


class Guest:
    """Booted when the constructor returns. Use it as a context manager: it is killed at the end.
    ``append``: for the kernel's command line. ``incoming``: a machine without a guest, until one migrates
    into it (guest/migration.py)."""

    def __init__(
        self,
        initramfs: Path,
        devices: Sequence[str],
        folder: Path,
        *,
        cpus: int = 1,
        memory_mib: int = 192,
        append: str = "",
        incoming: bool = False,
    ) -> None:
        self._input = b""
        self._number = 0
        monitor, qmp = socket.socketpair()
        with qmp:
            self._qemu = Qemu(
                CLOUD,
                initramfs,
                devices,
                folder,
                cpus=cpus,
                memory_mib=memory_mib,
                append=append,
                monitor=qmp,
                incoming=incoming,
            )
        self._command = self._qemu.command
        self._monitor = monitor
        try:
            self.qmp = Qmp(monitor)
            if not incoming:
                self._until_ready()
        except BaseException as error:
            self.close()
            raise self._failure(f"the guest did not start: {error!r}") from error

    def run(self, command: str, *, timeout: float = COMMAND_SECONDS, check: bool = True) -> Output:
        """Run a line of shell. With ``check`` an exit code other than 0 is an error."""
        if "\n" in command:
            raise ValueError(f"one line only: {command!r}")
        self._number += 1
        name = str(self._number)
        self._command.settimeout(timeout)
        self._command.sendall(f"{name} {command}\n".encode())
        code, text = self._until_end(name, timeout, command)
        if check and code:
            raise self._failure(f"{command!r} exited with {code}: {text}")
        return Output(code, text)

    def read(self, path: str) -> str:
        return self.run(f"cat {path}").text.strip()

    def start(self, command: str) -> Job:
        """Run a line of shell in the background; ``Job.wait()`` gives what ``run`` would."""
        self._number += 1
        name = f"/tmp/job{self._number}"
        self.run(f"mkfifo {name}.end; {{ ({command}) >{name}.out 2>&1; echo $? >{name}.end; }} &")
        return Job(self, name, command)

    def features(self, device: int = 0) -> int:
        """What the guest's driver negotiated: sysfs prints bit 0 first."""
        return int(self.read(f"/sys/bus/virtio/devices/virtio{device}/features")[::-1], 2)

    def reset(self) -> None:
        """The machine's reset button; returns when the guest is up again."""
        self.qmp.command("set-action", {"reboot": "reset"})
        self.qmp.command("system_reset")
        self.qmp.wait_event("RESET")
        self._until_ready()
        self.qmp.command("set-action", {"reboot": "shutdown"})

    def become(self, source: Guest) -> None:
        """The guest that ran in ``source`` is here now. No command of it may have been waited for."""
        self._number = max(self._number, source._number)

    def log(self) -> str:
        return self._qemu.log()

    def close(self) -> None:
        self._qemu.close()
        self._monitor.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if value is not None:
            value.add_note(self.log())

    def _until_ready(self) -> None:
        self._input = b""
        self._until_end("ready", BOOT_SECONDS, "boot")

    def _until_end(self, name: str, timeout: float, what: str) -> tuple[int, str]:
        deadline = time.monotonic() + timeout
        begin, end = f"\001{name}\n".encode(), f"\002{name} ".encode()
        while True:
            head, found, tail = self._input.partition(end)
            if found and b"\n" in tail:
                code, self._input = tail.split(b"\n", 1)
                return int(code), head.partition(begin)[2].decode(errors="replace")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._failure(f"{what!r} did not end in {timeout:.0f} s; output: {self._input!r}")
            self._command.settimeout(left)
            try:
                data = self._command.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise self._failure(f"QEMU ended during {what!r}, exit code {self._qemu.process.wait()}")
            self._input += data

    def _failure(self, text: str) -> GuestError:
        return GuestError(f"{text}\n{self.log()}")


class Job:
    """A command that runs in the guest's background."""

    def __init__(self, guest: Guest, name: str, command: str) -> None:
        self._guest = guest
        self._name = name
        self._command = command

    def move(self, guest: Guest) -> None:
        """The guest went to another machine, and took the job along."""
        self._guest = guest

    def wait(self, *, timeout: float = COMMAND_SECONDS, check: bool = True) -> Output:
        # Opening the fifo blocks until the job's shell opens it to write its exit code.
        done = self._guest.run(
            f"read -r code <{self._name}.end; cat {self._name}.out; exit $code", timeout=timeout, check=False
        )
        if check and done.code:
            raise GuestError(f"{self._command!r} exited with {done.code}: {done.text}\n{self._guest.log()}")
        return done
