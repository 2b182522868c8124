# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The kernels that guests run: which Debian suite has each, its modules, and what it must offer.

Data and places; standard library only, because the installer reads it. Does not download
(``peers.kernel_install``), boot (``guest.kernel``) or test anything.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("PYVHOST_CACHE") or REPOSITORY / ".cache").resolve()

# What the boot needs: virtio's PCI transport, and 9p for the host's file system. Dependencies are
# found in the modules themselves; a name that a kernel lacks is built in there.
BOOT = ("virtio_pci", "virtio_rng", "9p", "9pnet_virtio")

# Modules of each facility, in the order in which to load them. What "soft dependencies" and crypto
# requests would load by themselves on a system with modprobe is named here.
FACILITIES: dict[str, tuple[str, ...]] = {
    "net": ("tun", "tap", "vhost_net"),
    "vsock": ("vsock", "vhost_vsock"),
    "scsi": ("crct10dif_generic", "target_core_mod", "target_core_file", "vhost_scsi"),
    "vdpa": ("vdpa", "vhost_vdpa", "virtio_blk", "virtio_net", "virtio_vdpa"),
    "vduse": ("vduse", "crc32c_generic", "ext4"),
    "vdpa_sim": ("vdpa_sim_net", "vdpa_sim_blk"),
}
# Nodes that are there once the modules are loaded. vDPA's appear with each device.
NODES = {
    "net": ("/dev/vhost-net", "/dev/net/tun"),
    "vsock": ("/dev/vhost-vsock", "/dev/vsock"),
    "scsi": ("/dev/vhost-scsi",),
    "vdpa": (),
    "vduse": ("/dev/vduse/control",),
    "vdpa_sim": (),
}


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel. ``folder`` holds vmlinuz, vmlinux if it could be unpacked, modules/*.ko,
    the lists ``order.boot`` and ``order.run``, ``release``, and ``complete`` when all is there."""

    name: str
    suite: str  # "": the machine's own release
    package: str  # the meta package; the real one's name has the version in it
    folder: Path
    boot: tuple[str, ...]
    facilities: tuple[str, ...] = ()

    @property
    def run(self) -> tuple[str, ...]:
        """Modules to load after the boot, dependencies not included."""
        return tuple(module for name in self.facilities for module in FACILITIES[name])

    @property
    def builds(self) -> bool:
        """Modules of it are built from source."""
        return "vdpa_sim" in self.facilities

    @property
    def image(self) -> Path:
        """What QEMU boots fastest: the ELF image by PVH if there is one, else the bzImage."""
        vmlinux = self.folder / "vmlinux"
        return vmlinux if vmlinux.exists() else self.folder / "vmlinuz"

    @property
    def release(self) -> str:
        return (self.folder / "release").read_text().strip()

    @property
    def recipe(self) -> str:
        """Changes whenever an unpacked kernel would have to be unpacked again."""
        text = repr((self.suite, self.package, self.boot, self.run))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def missing(self) -> str:
        complete = self.folder / "complete"
        if not complete.exists():
            return f"{complete} is not there"
        if self.recipe not in complete.read_text().split():
            return f"{self.folder} was unpacked for another list of modules"
        return ""

    def modules(self, stage: str) -> list[Path]:
        """Of the stage "boot" or "run", in the order in which to load them."""
        names = (self.folder / f"order.{stage}").read_text().split()
        return [self.folder / "modules" / f"{name}.ko" for name in names]


# Boots on vhost-user devices, quickly: no file systems of its own.
CLOUD = Kernel(
    "cloud",
    "",
    "linux-image-cloud-amd64",
    CACHE / "kernels" / "cloud",
    ("virtio_pci", "virtio_blk", "virtio_rng", "virtiofs", "virtio_net"),
)

# Whose kernel and kernel headers are the newest that a Debian release offers.
NEWEST_SUITE = "trixie-backports"

# Have vhost, and run the tests below tests/kernel. 6.1 is before vDPA came to Debian; 6.12 has version 0
# of VDUSE's API, the newest has version 1.
_VHOST = ("net", "vsock", "scsi")
KERNELS: dict[str, Kernel] = {
    name: Kernel(name, suite, "linux-image-amd64", CACHE / "kernels" / name, BOOT, facilities)
    for name, suite, facilities in (
        ("6.1", "bookworm", _VHOST),
        ("6.12", "bookworm-backports", (*_VHOST, "vdpa", "vduse", "vdpa_sim")),
        ("newest", NEWEST_SUITE, (*_VHOST, "vdpa", "vduse")),
    )
}
