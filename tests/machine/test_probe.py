"""The probe: other machines from their files, control groups of both versions, disks, networks, and this machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from machine_trees import CPU, NODE, cpus, laptop, node, write_tree, xeon, xeon_max
from sartor.errors import JobError
from sartor.job.schema import MachineJob
from sartor.machine import machine_of, probe
from sartor.machine.catalogue import lookup
from sartor.machine.cgroup import memory_limits, processor_limit
from sartor.machine.memory import node_limits
from sartor.machine.probe import read_cpu, usable_cores
from sartor.machine.surroundings import device_link, disk_kind, disks, mount_of, networks, pci_address
from sartor.machine.topology import Cache, parse_list, physical_cores, read_topology

GIB = 2**30
MAX = "Intel(R) Xeon(R) CPU Max 9462"


# -- topology ------------------------------------------------------------------------------------------------------------------


def test_a_server_of_two_sockets(tmp_path: Path) -> None:
    topology = read_topology("Intel(R) Xeon(R) Platinum 8280", xeon(tmp_path))
    assert topology is not None
    assert (topology.sockets, topology.physical_cores, topology.logical_cores) == (2, 56, 112)
    assert [len(node.cpus) for node in topology.nodes] == [56, 56]
    assert [node.memory_bytes for node in topology.nodes] == [96 * GIB] * 2
    assert [node.distances for node in topology.nodes] == [(10, 21), (21, 10)]
    assert (topology.hbm_mode, topology.hbm_bytes) == ("", 0)
    assert topology.caches == (
        Cache(level=1, kind="data", size_bytes=32 * 2**10, shared_by=2, instances=56),
        Cache(level=1, kind="instruction", size_bytes=32 * 2**10, shared_by=2, instances=56),
        Cache(level=2, kind="unified", size_bytes=2**20, shared_by=2, instances=56),
        Cache(level=3, kind="unified", size_bytes=39424 * 2**10, shared_by=56, instances=2),
    )


@pytest.mark.parametrize("table", [True, False], ids=["with-bandwidths", "by-name"])
def test_high_bandwidth_memory_as_nodes_of_its_own(tmp_path: Path, table: bool) -> None:
    topology = read_topology(MAX, xeon_max(tmp_path, mode="flat", table=table))
    assert topology is not None
    assert topology.hbm_mode == "flat"
    assert [node.hbm for node in topology.nodes] == [False, False, True, True]
    assert [node.cpus for node in topology.nodes[2:]] == [(), ()]
    assert topology.hbm_bytes == 128 * GIB


@pytest.mark.parametrize("table", [True, False], ids=["with-cache-size", "by-name"])
def test_high_bandwidth_memory_as_a_cache(tmp_path: Path, table: bool) -> None:
    topology = read_topology(MAX, xeon_max(tmp_path, mode="cache", table=table))
    assert topology is not None
    assert (topology.hbm_mode, topology.hbm_bytes) == ("cache", 0)


def test_high_bandwidth_memory_and_no_other(tmp_path: Path) -> None:
    topology = read_topology(MAX, xeon_max(tmp_path, mode="only"))
    assert topology is not None
    assert (topology.hbm_mode, topology.hbm_bytes) == ("only", 127 * GIB)


def test_slow_memory_without_processors_is_no_hbm(tmp_path: Path) -> None:
    """CXL or persistent memory: nodes without processors as well, but slower than the memory beside the processors."""
    files = cpus(4, sockets=1) | {f"{NODE}/online": "0-1"}
    files |= node(0, cpulist="0-7", gib=64, bandwidth=200_000) | node(1, cpulist="", gib=256, bandwidth=30_000)
    topology = read_topology(MAX, write_tree(tmp_path, files))
    assert topology is not None
    assert not topology.nodes[1].hbm
    unknown = cpus(4, sockets=1) | {f"{NODE}/online": "0-1"} | node(0, cpulist="0-7", gib=64) | node(1, cpulist="", gib=256)
    topology = read_topology("AMD EPYC", write_tree(tmp_path / "unknown", unknown))
    assert topology is not None
    assert [(node.memory_bytes, node.hbm) for node in topology.nodes] == [(64 * GIB, False), (256 * GIB, False)]


def test_a_laptop_with_two_kinds_of_cores(tmp_path: Path) -> None:
    topology = read_topology("", laptop(tmp_path))
    assert topology is not None
    assert (topology.sockets, topology.physical_cores, topology.logical_cores) == (1, 14, 20)
    assert [(cache.level, cache.size_bytes >> 10, cache.shared_by, cache.instances) for cache in topology.caches] == [
        (1, 32, 1, 8),
        (1, 48, 2, 6),
        (2, 1280, 2, 6),
        (2, 2048, 4, 2),
        (3, 24576, 20, 1),
    ]
    assert len(physical_cores([0, 1, 2, 12], tmp_path)) == 3
    assert read_cpu(tmp_path) == ("12th Gen Intel(R) Core(TM) i7-12700H", ("avx2", "avx_vnni"))


def test_no_files_no_topology(tmp_path: Path) -> None:
    assert read_topology("Apple M3", tmp_path) is None
    assert read_cpu(tmp_path)[1] == ()


def test_processors_without_further_files(tmp_path: Path) -> None:
    """Containers may hide nearly everything."""
    topology = read_topology("", write_tree(tmp_path, {f"{CPU}/online": "0-3"}))
    assert topology is not None
    assert (topology.sockets, topology.physical_cores, topology.nodes, topology.caches) == (1, 4, (), ())


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("\n", ()), ("a-b", ()), ("1,", ()), ("5-", (5,))],
)
def test_lists_of_the_kernel(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_list(text) == numbers


# -- limits --------------------------------------------------------------------------------------------------------------------


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/user/job",
        f"{group}/user/memory.max": str(8 * GIB),
        f"{group}/user/memory.current": str(3 * GIB),
        f"{group}/user/memory.stat": f"anon 5\ninactive_file {GIB}",
        f"{group}/user/job/memory.max": "max",
        f"{group}/user/job/memory.current": str(2 * GIB),
        f"{group}/user/job/cpu.max": "150000 100000",
        f"{group}/user/cpu.max": "max 100000",
    }
    write_tree(tmp_path, files)
    assert memory_limits(tmp_path) == [(8 * GIB, 2 * GIB)]
    assert processor_limit(tmp_path) == 1.5


@pytest.mark.parametrize("hidden", [False, True], ids=["own-group", "container"])
def test_control_groups_of_version_1(tmp_path: Path, hidden: bool) -> None:
    """In a container the group's path is not there, but its own files are at the top."""
    place = "" if hidden else "/slurm/job_7"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n1:name=systemd:/\n0::/",
        f"sys/fs/cgroup/memory{place}/memory.limit_in_bytes": str(4 * GIB),
        f"sys/fs/cgroup/memory{place}/memory.usage_in_bytes": str(2 * GIB),
        f"sys/fs/cgroup/memory{place}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
        f"sys/fs/cgroup/cpu,cpuacct{place}/cpu.cfs_quota_us": "200000",
        f"sys/fs/cgroup/cpu,cpuacct{place}/cpu.cfs_period_us": "100000",
    }
    if not hidden:
        files |= {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
        files |= {"sys/fs/cgroup/memory/memory.usage_in_bytes": "1", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1"}
    write_tree(tmp_path, files)
    assert memory_limits(tmp_path) == [(4 * GIB, GIB)]
    assert processor_limit(tmp_path) == 2


def test_no_control_groups(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == []
    assert processor_limit(tmp_path) is None


def test_a_quota_of_processors_counts_as_cores(tmp_path: Path) -> None:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert usable_cores(tmp_path) == here
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"}
    assert usable_cores(write_tree(tmp_path, files)) == 1
    write_tree(tmp_path, {"sys/fs/cgroup/cpu.max": "99900000 100000"})
    assert usable_cores(tmp_path) == here


def test_memory_of_the_nodes_a_process_is_bound_to(tmp_path: Path) -> None:
    root = xeon(tmp_path)
    write_tree(root, {"proc/self/status": "Name:\tpython\nMems_allowed_list:\t0-1"})
    assert node_limits(root) == []
    write_tree(root, {"proc/self/status": "Name:\tpython\nMems_allowed_list:\t1"})
    assert node_limits(root) == [(96 * GIB, 16 * GIB)]


# -- surroundings --------------------------------------------------------------------------------------------------------------


def test_network_interfaces(tmp_path: Path) -> None:
    net = "sys/class/net"
    port = "sys/class/infiniband/mlx5_0/ports/1"
    files = {
        f"{net}/lo/operstate": "unknown",
        f"{net}/docker0/speed": "10000",
        f"{net}/eth0/device/vendor": "0x15b3",
        f"{net}/eth0/speed": "100000",
        f"{net}/eth0/operstate": "up",
        f"{net}/eth1/device/vendor": "0x1af4",
        f"{net}/eth1/speed": "-1",
        f"{net}/eth1/operstate": "up",
        f"{net}/wlan0/device/vendor": "0x8086",
        f"{net}/wlan0/wireless/status": "",
        f"{net}/wlan0/operstate": "down",
        f"{port}/rate": "400 Gb/sec (4X NDR)",
        f"{port}/state": "4: ACTIVE",
        f"{port}/link_layer": "InfiniBand",
    }
    found = networks(write_tree(tmp_path, files))
    assert [(network.name, network.kind, network.up, network.bytes_per_second) for network in found] == [
        ("mlx5_0:1", "infiniband", True, 50 * 10**9),
        ("eth0", "ethernet", True, 12_500_000_000),
        ("eth1", "ethernet", True, None),
        ("wlan0", "wireless", False, None),
    ]


def test_link_of_an_accelerator(tmp_path: Path) -> None:
    """An idle card runs its link slowly: what it can do counts, over the lanes that it has."""
    address = pci_address(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0))
    assert address == "0000:3b:00.0"
    place = f"sys/bus/pci/devices/{address}"
    files = {
        f"{place}/current_link_speed": "2.5 GT/s PCIe",
        f"{place}/max_link_speed": "16.0 GT/s PCIe",
        f"{place}/current_link_width": "8",
        f"{place}/numa_node": "1",
    }
    link = device_link(0, address, write_tree(tmp_path, files))
    assert (link.pcie_generation, link.pcie_lanes, link.numa_node, link.nvlinks) == (4, 8, 1, None)
    assert link.host_bytes_per_second == pytest.approx(15.75e9, rel=1e-3)
    assert device_link(0, address, tmp_path / "none").host_bytes_per_second is None
    assert pci_address(SimpleNamespace(name="x")) is None


def test_what_a_folder_is_stored_on(tmp_path: Path) -> None:
    mounts = "/dev/sda1 / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nhost:/home /home\\040of nfs4 rw 0 0"
    block = tmp_path / "sys/devices/pci0/block"
    write_tree(tmp_path, {"proc/self/mounts": mounts})
    assert mount_of(Path("/home of/me"), tmp_path) == ("nfs4", "host:/home")
    assert mount_of(Path("/tmp/x"), tmp_path) == ("tmpfs", "tmpfs")
    assert mount_of(Path("/temporary"), tmp_path) == ("ext4", "/dev/sda1")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    for minor, (name, rotational) in enumerate([("sda/sda1", "1"), ("sdb", "0"), ("nvme0n1/nvme0n1p2", "0"), ("vda", "1")]):
        whole = name.partition("/")[0]
        write_tree(tmp_path, {f"{block.relative_to(tmp_path)}/{whole}/queue/rotational": rotational})
        (block / name).mkdir(exist_ok=True)
        (tmp_path / f"sys/dev/block/8:{minor}").symlink_to(block / name)
    kinds = [disk_kind("ext4", os.makedev(8, minor), tmp_path) for minor in range(5)]
    assert kinds == ["hdd", "ssd", "nvme", "virtual", ""]
    assert [disk_kind(filesystem, os.makedev(8, 0), tmp_path) for filesystem in ("tmpfs", "lustre")] == ["memory", "network"]


def test_free_space_of_folders_that_are_to_be(tmp_path: Path) -> None:
    (disk, *_) = disks([tmp_path / "runs/first"])
    assert disk.folder == str(tmp_path / "runs/first")
    assert disk.total_bytes == psutil.disk_usage(str(tmp_path)).total
    assert 0 < disk.free_bytes <= disk.total_bytes


# -- machines ------------------------------------------------------------------------------------------------------------------


def test_this_machine() -> None:
    machine = probe()
    assert machine.topology is None or machine.topology.logical_cores >= machine.cores
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.disks
    assert machine.price_usd_per_hour is None


def test_a_machine_of_the_catalogue_has_its_rates() -> None:
    machine, model = probe(MachineJob(name="4xp5.48xlarge")), lookup("4xp5.48xlarge")
    assert machine.rates == dataclasses.replace(model.device, sources={})
    assert machine.network_bytes_per_second == model.network_bytes_per_second
    assert machine.price_usd_per_hour == model.price_usd_per_hour
    assert machine.price_date == model.price_date
    assert machine.topology is None
    assert not machine.disks


def test_machines_of_other_kinds_are_described_and_not_planned_for() -> None:
    machine = machine_of(lookup("2xtrn1.32xlarge"))
    assert (machine.device.kind, machine.devices, machine.nodes) == ("neuron", 64, 2)
    assert machine.network_bytes_per_second == 100 * 10**9
    with pytest.raises(JobError, match="kind neuron"):
        probe(MachineJob(name="trn1.32xlarge"))
