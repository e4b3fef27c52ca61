"""File trees as Linux shows other machines, cut down to what is read of them."""

from __future__ import annotations

from pathlib import Path

CPU, NODE = "sys/devices/system/cpu", "sys/devices/system/node"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A tree of small files under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def cpus(cores: int, *, sockets: int, threads: int = 2) -> dict[str, str]:
    """`cores` cores of `threads` logical processors over `sockets`, numbered as Linux does: first threads of all cores first."""
    files = {f"{CPU}/online": f"0-{cores * threads - 1}"}
    for cpu in range(cores * threads):
        core = cpu % cores
        files[f"{CPU}/cpu{cpu}/topology/core_cpus_list"] = ",".join(str(core + cores * thread) for thread in range(threads))
        files[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = str(core * sockets // cores)
    return files


def cache(cpu: int, index: int, *, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    place = f"{CPU}/cpu{cpu}/cache/index{index}"
    return {f"{place}/level": str(level), f"{place}/type": kind, f"{place}/size": size, f"{place}/shared_cpu_list": shared}


def node(number: int, *, cpulist: str, gib: int, free_gib: int = 0, bandwidth: int = 0, distance: str = "10") -> dict[str, str]:
    place = f"{NODE}/node{number}"
    meminfo = f"Node {number} MemTotal:       {gib * 2**20} kB\nNode {number} MemFree:        {free_gib * 2**20} kB\n"
    files = {f"{place}/cpulist": cpulist, f"{place}/meminfo": meminfo, f"{place}/distance": distance}
    return files | ({f"{place}/access0/initiators/read_bandwidth": str(bandwidth)} if bandwidth else {})


def xeon(root: Path) -> Path:
    """Two sockets of 28 cores, 112 logical processors, two NUMA nodes."""
    first = "0-27,56-83"
    files = cpus(56, sockets=2) | {f"{NODE}/online": "0-1"}
    files |= cache(0, 0, level=1, kind="Data", size="32K", shared="0,56") | cache(
        0, 1, level=1, kind="Instruction", size="32K", shared="0,56"
    )
    files |= cache(0, 2, level=2, kind="Unified", size="1024K", shared="0,56")
    files |= cache(0, 3, level=3, kind="Unified", size="39424K", shared=first)
    files |= node(0, cpulist=first, gib=96, free_gib=40, distance="10 21")
    files |= node(1, cpulist="28-55,84-111", gib=96, free_gib=80, distance="21 10")
    return write_tree(root, files)


def xeon_max(root: Path, *, mode: str, table: bool = True) -> Path:
    """Two sockets of Xeon CPU Max 9462: 32 cores each, 64 GiB of HBM each; `table`: the firmware gives bandwidths (HMAT)."""
    files = cpus(64, sockets=2)
    first, second = "0-31,64-95", "32-63,96-127"
    ddr, hbm = (200_000, 400_000) if table else (0, 0)
    if mode == "only":
        files |= {f"{NODE}/online": "0-1"} | node(0, cpulist=first, gib=63) | node(1, cpulist=second, gib=64)
        return write_tree(root, files)
    files |= node(0, cpulist=first, gib=256, bandwidth=ddr) | node(1, cpulist=second, gib=256, bandwidth=ddr)
    if mode == "flat":
        files |= {f"{NODE}/online": "0-3"}
        files |= node(2, cpulist="", gib=64, bandwidth=hbm) | node(3, cpulist="", gib=64, bandwidth=hbm)
    else:
        files |= {f"{NODE}/online": "0-1"}
        if table:
            files |= {f"{NODE}/node{number}/memory_side_cache/index1/size": str(64 * 2**30) for number in range(2)}
    return write_tree(root, files)


def laptop(root: Path) -> Path:
    """Six performance cores of two threads and eight efficiency cores, one socket, one node."""
    files = {f"{CPU}/online": "0-19", f"{NODE}/online": "0"} | node(0, cpulist="0-19", gib=16)
    for cpu in range(20):
        siblings = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" if cpu < 12 else str(cpu)
        files[f"{CPU}/cpu{cpu}/topology/core_cpus_list"] = siblings
        files[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = "0"
    files |= {"sys/devices/cpu_core/cpus": "0-11", "sys/devices/cpu_atom/cpus": "12-19"}
    files |= cache(0, 0, level=1, kind="Data", size="48K", shared="0-1")
    files |= cache(0, 1, level=2, kind="Unified", size="1280K", shared="0-1")
    files |= cache(0, 2, level=3, kind="Unified", size="24576K", shared="0-19")
    files |= cache(12, 0, level=1, kind="Data", size="32K", shared="12")
    files |= cache(12, 1, level=2, kind="Unified", size="2048K", shared="12-15")
    files |= cache(12, 2, level=3, kind="Unified", size="24576K", shared="0-19")
    files |= {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-12700H\nflags\t\t: fpu avx2 avx_vnni\n\n"
        "processor\t: 1\nmodel name\t: Another\nflags\t\t: amx_bf16"
    }
    return write_tree(root, files)
