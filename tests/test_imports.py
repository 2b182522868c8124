# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The direction of imports: lower layers never know the upper ones, and the protocol knows no I/O.

Parsed rather than imported, so that it holds for files whose extension modules are not built, and for
imports inside functions.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "vhost"

# What a module may import of this package, by longest matching prefix. A prefix names itself and all
# below it; "vhost.devices*" would be the same as "vhost.devices".
LOWEST = ("vhost.errors", "vhost.features")
UNDER_QUEUES = (
    *LOWEST,
    "vhost.py_refs",
    "vhost.wire",
    "vhost._core",
    "vhost.dirty_log",
    "vhost.inflight",
    "vhost.shmem",
    "vhost._ring",
    "vhost._iotlb",
    "vhost.iotlb",
    "vhost.memory",
    "vhost.chain",
)
RINGS = (
    *UNDER_QUEUES,
    "vhost._chain_pool",
    "vhost._look_ahead",
    "vhost._device_ring",
    "vhost.device_queue",
    "vhost.driver_queue",
    "vhost.virtqueue",
)
# Each knows those before it.
PROTOCOL_FILES = ("payloads", "gpu_payloads", "spec", "gpu_messages", "messages", "session")
PROTOCOL = (*LOWEST, *(f"vhost.user.{name}" for name in PROTOCOL_FILES))


def below_in_protocol(name: str) -> tuple[str, ...]:
    return PROTOCOL[: PROTOCOL.index(f"vhost.user.{name}")]


# What serves a device, whatever brings the requests.
SERVING = ("vhost.devices.base", "vhost.devices.requests", "vhost.devices.rings", "vhost.devices.session")
ROLES = (*RINGS, *PROTOCOL, *SERVING, "vhost.user.transport", "vhost.ops")
# What a device and its driver both put on the wire: data, below either.
WIRE = ("vhost.virtio_blk", "vhost.virtio_net", "vhost.virtio_vsock")
ANYTHING = ("vhost",)
ALLOWED: dict[str, tuple[str, ...]] = {
    "vhost.errors": (),
    "vhost.features": (),
    "vhost.py_refs": (),
    "vhost.wire": ("vhost.py_refs",),
    "vhost.iotlb": (),
    "vhost._iotlb": (*LOWEST, "vhost._core", "vhost.memory"),
    "vhost._core": (),
    "vhost._ring": RINGS,
    "vhost.memory": (*LOWEST, "vhost._core"),
    "vhost.dirty_log": (*LOWEST, "vhost._core", "vhost.memory"),
    "vhost.inflight": (*LOWEST, "vhost._core", "vhost.memory"),
    "vhost.shmem": (*LOWEST, "vhost._core"),
    "vhost.chain": UNDER_QUEUES,
    "vhost._chain_pool": ("vhost.py_refs", "vhost.memory", "vhost.chain"),
    "vhost._look_ahead": ("vhost.py_refs", "vhost._core", "vhost.memory", "vhost.chain", "vhost._chain_pool"),
    "vhost._device_ring": UNDER_QUEUES,
    "vhost.device_queue": RINGS,
    "vhost.driver_queue": RINGS,
    "vhost.virtqueue": RINGS,
    "vhost.ops": (*RINGS, "vhost.user.payloads"),
    **{f"vhost.user.{name}": below_in_protocol(name) for name in PROTOCOL_FILES},
    "vhost.user.transport": PROTOCOL,
    "vhost.user": (*ROLES, "vhost.user"),
    "vhost.virtio_blk": (*LOWEST, "vhost.wire"),
    "vhost.virtio_net": (*LOWEST, "vhost.wire"),
    "vhost.virtio_vsock": (*LOWEST, "vhost.wire"),
    "vhost.devices": (*RINGS, *WIRE, "vhost.devices"),
    "vhost.drivers": (*RINGS, *WIRE, "vhost.ops", "vhost.drivers"),
    "vhost.inprocess": (*RINGS, *SERVING, "vhost.ops"),
    "vhost.kernel.vduse": (*RINGS, *SERVING, "vhost.kernel"),
    "vhost.kernel": (*RINGS, "vhost.ops", "vhost.kernel"),
    "vhost.aio": (*ROLES, "vhost.user"),
    "vhost.probe": (*ROLES, *WIRE, "vhost.user"),
    # Seeing what passes: sans-IO, but for what sits between the two sides.
    "vhost.trace": (*PROTOCOL, "vhost.trace"),
    "vhost.trace.descriptors": (*PROTOCOL, "vhost.trace"),
    "vhost.trace.relay": (*PROTOCOL, "vhost.trace"),
    "vhost.trace.output": (),
    "vhost.trace.proxy": (*PROTOCOL, "vhost.trace", "vhost.user.listener"),
    "vhost.check": (*ROLES, *WIRE, "vhost.check"),
    "vhost.check.stage": (*ROLES, "vhost.user", "vhost.devices", "vhost.trace", "vhost.check"),
    "vhost.check.net_sink": (*RINGS, *SERVING, *WIRE),
    "vhost.check.rules_frontend": (*ROLES, "vhost.trace", "vhost.check"),
    "vhost.cli": ANYTHING,
    "vhost.demo": ANYTHING,
    "vhost.__main__": ANYTHING,
    "vhost.__init__": ANYTHING,
}
# The protocol is sans-IO, and the two lowest files are data.
PURE = ("vhost.errors", "vhost.features", *PROTOCOL, "vhost.trace")
NOT_PURE = frozenset(
    {"socket", "select", "selectors", "asyncio", "threading", "subprocess", "mmap", "ctypes"}
)
# Who serves must not depend on who is a client, and the other way round.
APART = [
    ("vhost.user.frontend", "vhost.user.backend"),
    ("vhost.user.backend", "vhost.user.frontend"),
    ("vhost.user.frontend_base", "vhost.user.backend"),
    ("vhost.user.handlers", "vhost.user.frontend_base"),
    ("vhost.devices", "vhost.drivers"),
    ("vhost.drivers", "vhost.devices"),
    ("vhost.kernel", "vhost.user"),
    ("vhost.user", "vhost.kernel"),
    ("vhost.user.frontend", "vhost.user.server"),
    ("vhost.user.backend", "vhost.user.server"),
]


CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+([\w.]+))", re.MULTILINE)


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 2:
        parts = parts[:-1]
    return ".".join(parts)


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere in it."""
    found: set[str] = set()
    package = name_of(path).split(".")
    if path.name != "__init__.py" or package[-1] == "__init__":
        package = package[:-1]
    if path.suffix in (".pyx", ".pxd"):
        # Cython is no Python to ast; "from . cimport" would be missed, and nobody writes it here.
        return {match[1] or match[2] for match in CYTHON_IMPORT.finditer(path.read_text())}
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                # "from vhost.user import payloads" imports a module if there is one of that name.
                whole = f"{base}.{alias.name}"
                found.add(whole if is_module(whole) else base)
    return found


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    if not name.startswith("vhost."):
        return False
    return (path / "__init__.py").exists() or any(
        path.with_suffix(suffix).exists() for suffix in (".py", ".pyi", ".pyx")
    )


def rule(module: str) -> str:
    matching = [prefix for prefix in ALLOWED if below(module, prefix)]
    assert matching, f"{module} has no place in the import direction: add it to ALLOWED"
    return max(matching, key=len)


FILES = sorted(path for suffix in ("*.py", "*.pyi", "*.pyx", "*.pxd") for path in ROOT.rglob(suffix))


def test_the_tree_is_where_this_test_looks() -> None:
    assert {"vhost.errors", "vhost.user.session"} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = name_of(path)
    allowed = ALLOWED[rule(module)]
    for name in sorted(imports(path)):
        if below(name, "vhost") and name != module:
            assert any(below(name, prefix) for prefix in allowed), f"{module} imports {name}"
        if rule(module) in PURE:
            assert name.split(".")[0] not in NOT_PURE, f"{module} must not know {name}"
    for one, other in APART:
        if below(module, one):
            assert not any(below(name, other) for name in imports(path)), f"{module} imports {other}"


def test_the_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, aliased and nested imports are seen for what they are."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "vhost")
    user = tmp_path / "vhost" / "user"
    user.mkdir(parents=True)
    for name in ("session", "transport", "payloads"):
        (user / f"{name}.py").write_text("")
    file = user / "messages.py"
    cython = user / "fast.pyx"
    cython.write_text(
        "from vhost.errors cimport (\n  x)\nimport socket\nif x:\n    cimport vhost.memory as m\n"
    )
    assert imports(cython) == {"vhost.errors", "socket", "vhost.memory"}
    file.write_text(
        "from . import transport\ndef f():\n    from .session import x\n    import vhost.user.payloads as p\n"
    )
    assert imports(file) == {"vhost.user.transport", "vhost.user.session", "vhost.user.payloads"}
