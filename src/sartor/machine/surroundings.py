"""What is around processors and memory: disks and their free space, network interfaces, links of accelerators.

Functions that read Linux's files take the root of the file system. What cannot be found out is None or left out.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.machine.topology import ROOT, read_number, read_text

_IN_MEMORY = ("tmpfs", "ramfs")
_OVER_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "beegfs",
    "ceph",
    "gpfs",
    "fuse.sshfs",
    "9p",
    "virtiofs",
    "afs",
    "wekafs",
)
# Bytes a second of one lane and direction, after the line's coding, by the transfer rate that sysfs gives.
# PCI Express Base Specification 6.0: 8b/10b up to 5 GT/s, 128b/130b up to 32 GT/s, 242 of 256 bytes of a flit at 64 GT/s.
_LANE_BYTES_PER_SECOND = {
    "2.5": 2.5e9 * 8 / 10 / 8,
    "5.0": 5e9 * 8 / 10 / 8,
    "8.0": 8e9 * 128 / 130 / 8,
    "16.0": 16e9 * 128 / 130 / 8,
    "32.0": 32e9 * 128 / 130 / 8,
    "64.0": 64e9 * 242 / 256 / 8,
}
_GENERATIONS = dict(zip(_LANE_BYTES_PER_SECOND, range(1, 7), strict=True))


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system that a folder is on."""

    folder: str
    kind: str
    """nvme, ssd, hdd, virtual, memory, network, or empty where it is not known."""
    filesystem: str
    total_bytes: int
    free_bytes: int
    """For this user."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network interface with a device behind it."""

    name: str
    kind: str
    """ethernet, wireless or infiniband."""
    up: bool
    bytes_per_second: int | None
    """One direction, as the link was negotiated; virtual ones do not say."""


@dataclass(frozen=True, kw_only=True)
class DeviceLink:
    """How an accelerator is attached."""

    index: int
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    host_bytes_per_second: int | None = None
    """One direction, after the line's coding: what no copy exceeds."""
    numa_node: int | None = None
    nvlinks: int | None = None
    """Links to other devices that are up; None where the driver's library (nvidia-ml-py) is not installed."""


def disks(folders: Iterable[Path] = (), root: Path = ROOT) -> tuple[Disk, ...]:
    """Of `folders`, the working folder and the one for temporary files; each file system once."""
    found: dict[tuple[int, int], Disk] = {}
    for folder in [*folders, Path.cwd(), Path(tempfile.gettempdir())]:
        existing = next((place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()), None)
        try:
            if existing is None or (key := (existing.stat().st_dev, 0)) in found:
                continue
            usage = shutil.disk_usage(existing)
        except OSError:
            continue
        filesystem, source = mount_of(existing, root)
        found[key] = Disk(
            folder=str(folder),
            kind=disk_kind(filesystem, existing.stat().st_dev, root),
            filesystem=filesystem or source,
            total_bytes=usage.total,
            free_bytes=usage.free,
        )
    return tuple(found.values())


def mount_of(folder: Path, root: Path = ROOT) -> tuple[str, str]:
    """Type and source of the file system that a folder is on, from the kernel's table; empty where there is none."""
    best: tuple[int, str, str] = (-1, "", "")
    for line in read_text(root / "proc/self/mounts").splitlines():
        words = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word) for word in line.split(" ")]
        if len(words) >= 3 and folder.is_relative_to(words[1]) and len(Path(words[1]).parts) >= best[0]:
            best = (len(Path(words[1]).parts), words[2], words[0])
    return best[1], best[2]


def disk_kind(filesystem: str, device_number: int, root: Path = ROOT) -> str:
    """What stores the files, by the file system or by the block device of that number."""
    if filesystem in _IN_MEMORY:
        return "memory"
    if filesystem in _OVER_NETWORK:
        return "network"
    block = (root / f"sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}").resolve()
    whole = block if (block / "queue").exists() else block.parent
    if whole.name.startswith("nvme"):
        return "nvme"
    if whole.name.startswith(("vd", "xvd")):
        return "virtual"
    rotational = read_number(whole / "queue/rotational")
    return "" if rotational is None else "hdd" if rotational else "ssd"


def networks(root: Path = ROOT) -> tuple[Network, ...]:
    """Interfaces with a device behind them, and InfiniBand ports, the fastest first."""
    found = []
    for interface in sorted((root / "sys/class/net").glob("*")):
        if (interface / "device").exists():
            megabits = read_number(interface / "speed") or 0
            wireless = (interface / "wireless").exists() or (interface / "phy80211").exists()
            found.append(
                Network(
                    name=interface.name,
                    kind="wireless" if wireless else "ethernet",
                    up=read_text(interface / "operstate") == "up",
                    bytes_per_second=megabits * 10**6 // 8 or None,
                )
            )
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        rate = re.match(r"(\d+(?:\.\d+)?) Gb/sec", read_text(port / "rate"))
        if read_text(port / "link_layer") != "Ethernet":
            speed = int(float(rate[1]) * 1e9 / 8) if rate else None
            up = "ACTIVE" in read_text(port / "state")
            found.append(Network(name=f"{port.parts[-3]}:{port.name}", kind="infiniband", up=up, bytes_per_second=speed))
    return tuple(sorted(found, key=lambda network: (not network.up, -(network.bytes_per_second or 0), network.name)))


def device_link(index: int, address: str, root: Path = ROOT) -> DeviceLink:
    """Of the accelerator at a PCI address such as `0000:3b:00.0`. An idle one lowers its rate: the best it can is taken."""
    place = root / "sys/bus/pci/devices" / address.lower()
    rate = re.match(r"([\d.]+) GT/s", read_text(place / "max_link_speed"))
    lanes = read_number(place / "current_link_width") or read_number(place / "max_link_width")
    lane = _LANE_BYTES_PER_SECOND.get(rate[1]) if rate else None
    node = read_number(place / "numa_node")
    return DeviceLink(
        index=index,
        pcie_generation=_GENERATIONS.get(rate[1]) if rate else None,
        pcie_lanes=lanes,
        host_bytes_per_second=int(lanes * lane) if lanes and lane else None,
        numa_node=node,
        nvlinks=_nvlinks(address),
    )


def pci_address(properties: Any) -> str | None:
    """Of torch's device properties; None where they do not tell."""
    numbers = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return "{:04x}:{:02x}:{:02x}.0".format(*map(int, numbers))  # type: ignore[arg-type]


def _nvlinks(address: str) -> int | None:
    """Links that are up, as NVIDIA's driver says; None without its library."""
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    except pynvml.NVMLError:
        return None
    count = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            count += int(pynvml.nvmlDeviceGetNvLinkState(handle, link))
        except pynvml.NVMLError:
            break
    return count
