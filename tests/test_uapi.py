# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""csrc/vhost_uapi.h against the kernel's own headers: each number, size, offset and constant.

One C program is compiled twice, with our header and with linux/vhost.h and linux/vduse.h; what older
headers lack is left out there by the preprocessor, and named in the summary of the run.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from peers.catalogue import KERNEL_HEADERS
from vhost.features import BackendF, VhostF, VringF
from vhost.kernel._ioctl import Ioctl
from vhost.kernel.iotlb import Access, IotlbType

ROOT = Path(__file__).resolve().parent.parent

# struct -> its fields, and the macro by which a header shows that it has it ("": all of them do).
STRUCTS: dict[str, tuple[str, str]] = {
    "vhost_vring_state": ("index num", ""),
    "vhost_vring_file": ("index fd", ""),
    "vhost_vring_addr": ("index flags desc_user_addr used_user_addr avail_user_addr log_guest_addr", ""),
    "vhost_memory_region": ("guest_phys_addr memory_size userspace_addr flags_padding", ""),
    "vhost_memory": ("nregions padding regions", ""),
    "vhost_worker_state": ("worker_id", "VHOST_NEW_WORKER"),
    "vhost_vring_worker": ("index worker_id", "VHOST_NEW_WORKER"),
    "vhost_features_array": ("count features", "VHOST_GET_FEATURES_ARRAY"),
    "vhost_scsi_target": ("abi_version vhost_wwpn vhost_tpgt reserved", ""),
    "vhost_vdpa_config": ("off len buf", ""),
    "vhost_vdpa_iova_range": ("first last", ""),
    "vhost_iotlb_msg": ("iova size uaddr perm type", ""),
    "vhost_msg": ("type iotlb padding", ""),
    "vhost_msg_v2": ("type asid iotlb padding", ""),
    "vduse_dev_config": ("name vendor_id device_id features vq_num vq_align config_size config", ""),
    "vduse_iotlb_entry": ("offset start last perm", ""),
    "vduse_iotlb_entry_v2": ("offset start last perm asid reserved", "VDUSE_IOTLB_GET_FD2"),
    "vduse_config_data": ("offset length buffer", ""),
    "vduse_vq_config": ("index max_size", ""),
    "vduse_vq_state_split": ("avail_index", ""),
    "vduse_vq_state_packed": ("last_avail_counter last_avail_idx last_used_counter last_used_idx", ""),
    "vduse_vq_info": ("index num desc_addr driver_addr device_addr split packed ready", ""),
    "vduse_vq_eventfd": ("index fd", ""),
    "vduse_iova_umem": ("uaddr iova size", "VDUSE_IOTLB_REG_UMEM"),
    "vduse_iova_info": ("start last capability", "VDUSE_IOTLB_GET_INFO"),
    "vduse_vq_state": ("index split packed", ""),
    "vduse_vq_group_asid": ("group asid", "VDUSE_API_VERSION_1"),
    "vduse_dev_status": ("status", ""),
    "vduse_iova_range": ("start last", ""),
    "vduse_iova_range_v2": ("start last asid", "VDUSE_API_VERSION_1"),
    "vduse_dev_request": ("type request_id reserved vq_state s iova padding", ""),
    "vduse_dev_response": ("request_id result reserved vq_state padding", ""),
}
# Fields that came to structs which were there before.
LATER = {
    "VDUSE_API_VERSION_1": {
        "vduse_dev_config": "ngroups nas",
        "vduse_vq_config": "group",
        "vduse_iova_umem": "asid",
        "vduse_iova_info": "asid",
        "vduse_dev_request": "iova_v2 vq_group_asid",
    }
}
MACROS = """
    VHOST_VRING_F_LOG VHOST_F_LOG_ALL VHOST_NET_F_VIRTIO_NET_HDR VHOST_VRING_LITTLE_ENDIAN
    VHOST_VRING_BIG_ENDIAN VHOST_FORK_OWNER_KTHREAD VHOST_FORK_OWNER_TASK VHOST_SCSI_ABI_VERSION
    VHOST_BACKEND_F_IOTLB_MSG_V2 VHOST_BACKEND_F_IOTLB_BATCH VHOST_BACKEND_F_IOTLB_ASID
    VHOST_BACKEND_F_SUSPEND VHOST_BACKEND_F_RESUME VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK
    VHOST_BACKEND_F_DESC_ASID VHOST_BACKEND_F_IOTLB_PERSIST
    VHOST_ACCESS_RO VHOST_ACCESS_WO VHOST_ACCESS_RW VHOST_IOTLB_MSG VHOST_IOTLB_MSG_V2 VHOST_IOTLB_MISS
    VHOST_IOTLB_UPDATE VHOST_IOTLB_INVALIDATE VHOST_IOTLB_ACCESS_FAIL VHOST_IOTLB_BATCH_BEGIN
    VHOST_IOTLB_BATCH_END VDUSE_NAME_MAX VDUSE_REQ_RESULT_OK VDUSE_REQ_RESULT_FAILED VDUSE_IOVA_CAP_UMEM
""".split()
# Enumerators: the preprocessor does not see them.
ENUMERATORS = {
    "VDUSE_GET_VQ_STATE": "",
    "VDUSE_SET_STATUS": "",
    "VDUSE_UPDATE_IOTLB": "",
    "VDUSE_SET_VQ_GROUP_ASID": "VDUSE_API_VERSION_1",
}


@dataclass
class Facts:
    values: dict[str, int]
    lacking: list[str]


def program() -> str:
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include HEADERS", "int main(void)", "{"]

    def show(name: str, expression: str, guard: str) -> None:
        there = f'printf("{name} %lu\\n", (unsigned long)({expression}));'
        if guard:
            lines.extend(
                [f"#if defined(OURS) || defined({guard})", there, "#else", f'puts("{name} -");', "#endif"]
            )
        else:
            lines.append(there)

    for name in (*Ioctl.names(), *MACROS):
        show(name, f"(unsigned)({name})" if "_SET_" in name or "_GET_" in name else name, name)
    for name, guard in ENUMERATORS.items():
        show(name, name, guard)
    for struct, (fields, guard) in STRUCTS.items():
        show(struct, f"sizeof(struct {struct})", guard)
        for field in fields.split():
            show(f"{struct}.{field}", f"offsetof(struct {struct}, {field})", guard)
    for guard, structs in LATER.items():
        for struct, fields in structs.items():
            for field in fields.split():
                show(f"{struct}.{field}", f"offsetof(struct {struct}, {field})", guard)
    return "\n".join([*lines, "}", ""])


def facts(folder: Path, name: str, headers: str, *options: str) -> Facts:
    (folder / f"{name}_headers.h").write_text(headers)
    (folder / f"{name}.c").write_text(program())
    command = ["gcc", "-Wall", "-Werror", f'-DHEADERS="{name}_headers.h"', *options]
    command += ["-o", str(folder / name), str(folder / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = subprocess.run([folder / name], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in output.splitlines()]
    return Facts({key: int(value) for key, value in pairs if value != "-"}, [k for k, v in pairs if v == "-"])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return facts(
        tmp_path_factory.mktemp("uapi"), "ours", '#include "vhost_uapi.h"\n', "-DOURS", f"-I{ROOT / 'csrc'}"
    )


@pytest.mark.parametrize("which", ["installed", "newest"])
def test_every_number_size_and_offset(
    which: str, ours: Facts, tmp_path: Path, record_property: object, request: pytest.FixtureRequest
) -> None:
    options = []
    if which == "newest":
        if not KERNEL_HEADERS.exists():
            pytest.skip(f"{KERNEL_HEADERS} is not there (make peers)")
        options = [f"-I{path}" for path in sorted(KERNEL_HEADERS.rglob("include*")) if path.is_dir()]
    headers = "#include <linux/vhost.h>\n#include <linux/vduse.h>\n"
    theirs = facts(tmp_path, which, headers, *options)
    assert not ours.lacking
    assert theirs.values == {name: ours.values[name] for name in theirs.values}
    assert len(theirs.values) + len(theirs.lacking) == len(ours.values)
    lacking = " ".join(theirs.lacking) or "nothing"
    request.config.stash.setdefault(LACKING, []).append(f"{which} kernel headers lack: {lacking}")
    if which == "newest":
        assert not theirs.lacking


def test_the_comparison_can_fail(ours: Facts, tmp_path: Path) -> None:
    text = (ROOT / "csrc" / "vhost_uapi.h").read_text().replace("int abi_version;", "long abi_version;")
    (tmp_path / "vhost_uapi.h").write_text(text)
    bent = facts(tmp_path, "bent", '#include "vhost_uapi.h"\n', "-DOURS", f"-I{tmp_path}")
    fields = {f"vhost_scsi_target.{name}" for name in ("vhost_wwpn", "vhost_tpgt", "reserved")}
    ioctls = {"VHOST_SCSI_SET_ENDPOINT", "VHOST_SCSI_CLEAR_ENDPOINT"}
    assert {name for name in ours.values if bent.values[name] != ours.values[name]} == {
        "vhost_scsi_target",
        *fields,
        *ioctls,
    }


def test_enums_of_the_package(ours: Facts) -> None:
    for number in IotlbType:
        assert ours.values[f"VHOST_IOTLB_{number.name}"] == number
    for access in Access:
        assert ours.values[f"VHOST_ACCESS_{access.name}"] == access
    assert VhostF.LOG_ALL == 1 << ours.values["VHOST_F_LOG_ALL"]
    assert VringF.LOG == 1 << ours.values["VHOST_VRING_F_LOG"]
    for feature in BackendF:
        assert feature == 1 << ours.values[f"VHOST_BACKEND_F_{feature.name}"]
