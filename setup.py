# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What pyproject.toml cannot say: the C core, and the extension modules over it."""

import os
import subprocess
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra"]
if os.environ.get("PYVHOST_WERROR"):
    WARNINGS.append("-Werror")

# Baseline code for any machine of the architecture: hot paths that want more dispatch at run time.
CFLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-pthread"]
# What Cython generates is not ours to keep free of these two.
GENERATED = ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]

CORE = [
    "csrc/guest_memory.c",
    "csrc/iotlb.c",
    "csrc/chain.c",
    "csrc/virtqueue.c",
    "csrc/device_split.c",
    "csrc/device_split_swapped.c",
    "csrc/device_packed.c",
    "csrc/inflight.c",
    "csrc/inflight_split.c",
    "csrc/inflight_packed.c",
    "csrc/ring_shadow.c",
    "csrc/driver_split.c",
    "csrc/driver_packed.c",
    "csrc/sigbus.c",
    "csrc/dirty_log.c",
    "csrc/virtqueue_log.c",
    "csrc/engine.c",
    "csrc/engine_worker.c",
]
BLK = [
    "csrc/engine_blk.c",
    "csrc/blk_request.c",
    "csrc/blk_disk.c",
    "csrc/blk_map.c",
    "csrc/blk_merge.c",
    "csrc/blk_pool.c",
    "csrc/blk_uring.c",
]
NET = [
    "csrc/engine_net.c",
    "csrc/net_wire.c",
    "csrc/net_receive.c",
    "csrc/net_frame.c",
    "csrc/net_csum.c",
    "csrc/net_fd.c",
    "csrc/net_fit.c",
    "csrc/net_segment.c",
]
HEADERS = sorted(str(path) for folder in ("csrc", "vhost") for path in Path(folder).glob("*.h"))


class BuildExt(build_ext):
    """`setup.py build_ext` alone, too, builds the C core that the extensions are linked to. And liburing
    is linked in where it is installed, rather its archive than its shared object, which not every machine has
    that gets a wheel; without it, threads do its work."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extensions(self) -> None:
        words = self.liburing()
        for one in self.extensions:
            if one.name == "vhost.devices._blk_engine" and words:
                one.define_macros.append(("VHOST_LIBURING", "1"))
                one.extra_link_args += words
        super().build_extensions()

    def liburing(self) -> list[str]:
        """The linker's words for it; none where it cannot be linked."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text(
                "#include <liburing.h>\nint probe(void) { return io_uring_queue_init(1, 0, 0); }\n"
            )
            for words in (["-l:liburing.a"], ["-luring"]):
                target = ["-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
                command = [*self.compiler.linker_so, *target, *words]
                if not subprocess.run(command, capture_output=True).returncode:
                    return words
        return []


def extension(name: str, *sources: str) -> Extension:
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx", *sources],
        include_dirs=["csrc", "vhost"],
        depends=[*HEADERS, *CORE],  # linked in, so a change there is one of the extension
        extra_compile_args=CFLAGS + WARNINGS + GENERATED,
        extra_link_args=["-pthread"],
    )


setup(
    cmdclass={"build_ext": BuildExt},
    libraries=[
        (
            "vhostcore",
            {
                "sources": CORE,
                "include_dirs": ["csrc"],
                "obj_deps": {"": HEADERS},
                "cflags": CFLAGS + WARNINGS + ["-fPIC"],
            },
        )
    ],
    ext_modules=cythonize(
        [
            extension("vhost.memory"),
            extension("vhost.wire"),
            extension("vhost.chain"),
            extension("vhost._iotlb"),
            extension("vhost._ring"),
            extension("vhost.dirty_log"),
            extension("vhost.inflight"),
            extension("vhost.shmem"),
            extension("vhost._device_ring"),
            extension("vhost.device_queue"),
            extension("vhost.driver_queue"),
            extension("vhost.user._userfault", "csrc/userfault.c"),
            extension("vhost.kernel._ioctl"),
            extension("vhost.kernel._vduse"),
            extension("vhost.devices._engine"),
            extension("vhost.devices._blk_engine", *BLK),
            extension("vhost.devices._net_engine", *NET),
            extension(
                "vhost.drivers._net_queue", "csrc/driver_net.c", "csrc/driver_net_pump.c", "csrc/net_csum.c"
            ),
        ],
        compiler_directives={
            "language_level": 3,
            "binding": False,
            "embedsignature": True,
            # An interpreter without the lock need not take it for these: what threads share in an object is
            # guarded by the object's own (critical sections).
            "freethreading_compatible": True,
        },
    ),
)
