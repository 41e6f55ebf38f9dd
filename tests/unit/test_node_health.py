"""What breaks nodes of clusters, each named by `dstune doctor` with what to do.

No GPU, adapter or NFS server could be reached: outputs are written after the documented formats that `node_health` names.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dstune.launch import node_health, probe
from dstune.protocols.launcher import FAIL, PASS, WARN

GIB = 2**30


def port(device: str = "mlx5_0", **changes: Any) -> dict[str, Any]:
    facts = {"device": device, "port": "1", "state": "ACTIVE", "physical": "LinkUp", "gigabits": 400.0}
    return facts | {"layer": "InfiniBand", "gids": [0, 1]} | changes


GPU = """
<gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name><compute_mode>Default</compute_mode>
  <fabric><state>Completed</state><status>Success</status></fabric>
  <pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width><current_link_width>16x</current_link_width></link_widths>
  </pci_gpu_link_info></pci>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
    <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
    <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
    <clocks_event_reason_hw_power_brake_slowdown>Not Active</clocks_event_reason_hw_power_brake_slowdown>
    <clocks_event_reason_sw_thermal_slowdown>Not Active</clocks_event_reason_sw_thermal_slowdown>
  </clocks_event_reasons>
  <ecc_errors><volatile><sram_correctable>0</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
    <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_correctable>3</dram_correctable>
    <dram_uncorrectable>0</dram_uncorrectable></volatile></ecc_errors>
  <remapped_rows><remapped_row_corr>0</remapped_row_corr><remapped_row_unc>0</remapped_row_unc>
    <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>
  <temperature><gpu_temp>41 C</gpu_temp></temperature>
</gpu>"""
SMI = f"<nvidia_smi_log>{GPU.format(bus='1B')}{GPU.format(bus='43')}</nvidia_smi_log>"
SOUND: dict[str, Any] = {
    "environment": {},
    "variables": {},
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1", "docker0": "172.17.0.1"},
    "ports": [port(), port("mlx5_1")],
    "peer_memory": True,
    "nvidia_smi": SMI,
    "nvidia_smi_error": "",
    "driver_gpus": 2,
    "kernel_messages": [],
    "limits": {"open files": [1048576, 1048576], "processes": [None, None], "locked memory": [None, None]},
    "most_processes": None,
    "memory_limit": None,
    "memory_bytes": 2048 * GIB,
    "shared_bytes": 1024 * GIB,
    "clock_synchronized": True,
    "mounts": {"/shared/run": ("nfs4", "rw,relatime,vers=4.2,hard,proto=tcp,local_lock=none")},
}
XID = "[Tue Dec  1 03:14:15 2026] NVRM: Xid (PCI:0000:43:00): {}, pid=4321, name=python, GPU has failed"


def smi(old: str, new: str) -> dict[str, Any]:
    assert old in SMI
    return {"nvidia_smi": SMI.replace(old, new, 1)}


def variables(**values: str) -> dict[str, Any]:
    return {"variables": values, "environment": values}


def throttled(reason: str) -> dict[str, Any]:
    name = f"clocks_event_reason_{reason}"
    return smi(f"<{name}>Not Active", f"<{name}>Active")


def mounted(kind: str, options: str) -> dict[str, Any]:
    return {"mounts": {"/shared/run": (kind, options)}}


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "an interface that is not there": (
        variables(NCCL_SOCKET_IFNAME="ib"),
        FAIL,
        "selects none of this node's interfaces",
    ),
    "an interface that leads nowhere": (variables(NCCL_SOCKET_IFNAME="docker"), FAIL, "no way to other nodes"),
    "all interfaces but the right one": (variables(NCCL_SOCKET_IFNAME="^eth"), FAIL, "no way to other nodes"),
    "gloo's interface": (variables(GLOO_SOCKET_IFNAME="eth"), FAIL, "GLOO_SOCKET_IFNAME=eth selects none"),
    "an adapter that is not there": (variables(NCCL_IB_HCA="mlx4"), WARN, "NCCL then uses TCP"),
    "the fabric switched off": (variables(NCCL_IB_DISABLE="1"), WARN, "TCP instead of the fabric"),
    "peer access switched off": (variables(NCCL_P2P_DISABLE="1"), WARN, "through host memory"),
    "every kernel waits": (variables(CUDA_LAUNCH_BLOCKING="1"), WARN, "waits for the one before"),
    "an empty GID": (variables(NCCL_IB_GID_INDEX="3"), FAIL, "is an empty entry of mlx5_0:1, mlx5_1:1 (filled: 0, 1)"),
    "a cable that is out": (
        {"ports": [port(), port("mlx5_1", state="DOWN", physical="Polling")]},
        WARN,
        "mlx5_1:1 is DOWN (Polling)",
    ),
    "no subnet manager": ({"ports": [port(), port("mlx5_1", state="INIT")]}, WARN, "no subnet manager"),
    "a port at a lower rate": ({"ports": [port(), port("mlx5_1", gigabits=100.0)]}, WARN, "100 Gb/s, others at 400"),
    "no memory may be locked": (
        {"limits": SOUND["limits"] | {"locked memory": [65536, 65536]}},
        FAIL,
        "64 KiB may be locked",
    ),
    "no direct way from the adapter to the GPU": ({"peer_memory": False}, WARN, "nvidia_peermem"),
    "a GPU off the bus": (
        {"kernel_messages": [XID.format(79)]},
        FAIL,
        "Xid 79 of 0000:43:00 since the start: the GPU has fallen",
    ),
    "a memory error": ({"kernel_messages": [XID.format(94)] * 2}, WARN, "Xid 94 of 0000:43:00, 2 times"),
    "a broken link between GPUs": ({"kernel_messages": [XID.format(74)]}, FAIL, "NVLink error"),
    "a dead system processor": ({"kernel_messages": [XID.format(119)]}, FAIL, "system processor does not answer"),
    "an unknown Xid": ({"kernel_messages": [XID.format(999)]}, WARN, "Xid 999"),
    "a program ended for lack of memory": (
        {"kernel_messages": ["kernel: Out of memory: Killed process 77 (python) total-vm:1kB"]},
        WARN,
        "ended 1 program for lack of memory",
    ),
    "a GPU that does not answer": ({"driver_gpus": 3}, FAIL, "the driver has 3 GPUs, and nvidia-smi shows 2"),
    "another driver": (
        {"nvidia_smi": "", "nvidia_smi_error": "Failed to initialize NVML: Driver/library version mismatch"},
        FAIL,
        "version mismatch",
    ),
    "a driver that hangs": ({"nvidia_smi": "", "nvidia_smi_error": "no answer in 20 s"}, FAIL, "no answer in 20 s"),
    "uncorrectable errors": (
        smi("<dram_uncorrectable>0", "<dram_uncorrectable>2"),
        FAIL,
        "GPU 0 (00000000:1B:00.0) has had 2 uncorrectable memory errors",
    ),
    "rows to be replaced": (smi("pending>No", "pending>Yes"), WARN, "replaced when the GPU is reset"),
    "rows that cannot be replaced": (smi("failure>No", "failure>Yes"), FAIL, "cannot replace bad rows"),
    "too hot": (throttled("hw_thermal_slowdown"), WARN, "runs at lower clocks: too hot (41 C)"),
    "the power brake": (throttled("hw_power_brake_slowdown"), WARN, "braked by the power supply"),
    "half of the lanes": (smi("<current_link_width>16x", "<current_link_width>8x"), WARN, "8 of 16 PCIe lanes"),
    "no fabric manager": (smi("<state>Completed", "<state>In Progress"), FAIL, "CUDA fails with error 802"),
    "a GPU for nobody": (smi("<compute_mode>Default", "<compute_mode>Prohibited"), FAIL, "admits no programs"),
    "a clock of its own": ({"clock_synchronized": False}, WARN, "not synchronized"),
    "a container's memory": ({"memory_limit": 64 * GIB}, WARN, "64 of the machine's 2048 GiB"),
    "a container's processes": ({"most_processes": 512}, WARN, "at most 512 processes"),
    "a container's shared memory": ({"shared_bytes": 64 * 2**20}, WARN, "0.1 GiB free"),
    "few open files": ({"limits": SOUND["limits"] | {"open files": [1024, 4096]}}, WARN, "1024 (at most 4096)"),
    "locks of NFS that are local": (mounted("nfs", "rw,vers=3,nolock,proto=tcp"), FAIL, "NFS with nolock"),
    "locks of NFS by flock that are local": (mounted("nfs4", "rw,local_lock=flock"), FAIL, "local_lock=flock"),
    "Lustre without locks": (mounted("lustre", "rw,lazystatfs"), FAIL, "without flock"),
    "Lustre with local locks": (mounted("lustre", "rw,localflock"), FAIL, "localflock"),
    "a folder of this container": (mounted("overlay", "rw,lowerdir=/a"), WARN, "which no other node sees"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_what_to_do(fault: str) -> None:
    changes, status, words = FAULTS[fault]
    facts = copy.deepcopy(SOUND) | changes
    findings = [check for check in node_health.judge(facts, several_nodes=True) if check.status != PASS]
    assert [check.status for check in findings if words in check.detail] == [status], findings
    assert all(check.fix for check in findings)
    assert len(findings) == 1, findings


def test_a_sound_node_has_no_findings() -> None:
    checks = list(node_health.judge(SOUND, several_nodes=True))
    assert {check.status for check in checks} == {PASS}
    assert {check.name for check in checks} >= {"/dev/shm", "open files", "fabric", "GPU health"}


def test_names_of_earlier_drivers_are_read() -> None:
    facts = copy.deepcopy(SOUND) | throttled("hw_slowdown")
    facts["nvidia_smi"] = facts["nvidia_smi"].replace("clocks_event", "clocks_throttle")
    assert [c.detail for c in node_health.judge(facts, several_nodes=False) if c.status == WARN] == [
        "GPU 0 (00000000:1B:00.0) runs at lower clocks: slowed down by the hardware"
    ]
    pages = "<retired_pages><pending_retirement>Yes</pending_retirement></retired_pages></gpu>"
    double = "<double_bit><total>1</total></double_bit></volatile>"
    old = SMI.replace("</gpu>", pages, 1).replace("</volatile>", double, 1)
    findings = list(node_health.judge(SOUND | {"nvidia_smi": old}, several_nodes=False))
    assert [check.status for check in findings if check.name == "GPU health"] == [FAIL, WARN]


def test_errors_of_programs_are_none_of_the_machine() -> None:
    facts = SOUND | {"kernel_messages": [XID.format(number) for number in (13, 31, 43, 45)]}
    assert all(check.status == PASS for check in node_health.judge(facts, several_nodes=True))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("=eth0,eth1", ["eth0", "eth1"]),
        ("^docker,lo", ["eth0", "eth1"]),
        ("^=docker0", ["eth0", "eth1", "lo"]),
    ],
)
def test_lists_of_nccl(pattern: str, expected: list[str]) -> None:
    assert node_health.selected(pattern, ["docker0", "eth0", "eth1", "lo"]) == expected


def test_ports_are_read_from_the_kernel_s_files(tmp_path: Path) -> None:
    folder = tmp_path / "mlx5_0" / "ports" / "1"
    (folder / "gids").mkdir(parents=True)
    for name, content in {
        "state": "4: ACTIVE",
        "phys_state": "5: LinkUp",
        "rate": "400 Gb/sec (4X NDR)",
        "link_layer": "Ethernet",
        "gids/0": "fe80:0000:0000:0000:0e42:a1ff:fe12:3456",
        "gids/1": "0000:0000:0000:0000:0000:0000:0000:0000",
    }.items():
        (folder / name).write_text(content + "\n")
    assert probe.ports(str(tmp_path)) == [port(layer="Ethernet", gids=[0])]
    assert probe.ports(str(tmp_path / "none")) == []


def test_the_mount_of_a_folder_is_the_nearest(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(
        "overlay / overlay rw 0 0\nserver:/a /shared nfs4 rw,nolock 0 0\nserver:/b /shared/my\\040runs lustre rw,flock 0 0\n"
    )
    assert probe.mount("/shared/x", str(table)) == ("nfs4", "rw,nolock")
    assert probe.mount("/shared/my runs/y", str(table)) == ("lustre", "rw,flock")
    assert probe.mount("/sharedx", str(table)) == ("overlay", "rw")


def test_this_machine_is_judged_and_a_start_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = list(node_health.judge(probe.health([str(tmp_path)]), several_nodes=False))
    assert {"/dev/shm", "open files"} <= {check.name for check in checks}
    assert not list(node_health.warnings_at_start(tmp_path, several_nodes=False))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    (warning,) = node_health.warnings_at_start(tmp_path, several_nodes=False)
    assert "NCCL_SOCKET_IFNAME=ib selects none" in warning and "unset NCCL_SOCKET_IFNAME" in warning
    conf = tmp_path / "nccl.conf"
    conf.write_text("# of this site\nNCCL_SOCKET_IFNAME = ^lo\nNCCL_P2P_DISABLE=1\n")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_CONF_FILE", str(conf))
    facts = probe.health([str(tmp_path)], quick=True)
    assert facts["variables"]["NCCL_SOCKET_IFNAME"] == "^lo"
    (variable,) = [check for check in node_health.judge(facts, several_nodes=False) if check.name == "variables"]
    assert "in /etc/nccl.conf" in variable.detail
