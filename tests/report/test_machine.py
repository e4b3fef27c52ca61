"""A machine on the terminal and as JSON: this one, one of the catalogue, one with high-bandwidth memory, and measured rates."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from machine_trees import xeon_max
from sartor.job.schema import MachineJob
from sartor.machine import Machine, machine_of, probe
from sartor.machine.calibration import (
    AttentionRate,
    Calibration,
    CollectiveRate,
    DeviceRates,
    DiskRate,
    Kept,
    LinkRate,
    LossRate,
    MatmulRate,
    MemoryRate,
)
from sartor.machine.catalogue import lookup
from sartor.machine.surroundings import DeviceLink, Disk, Network
from sartor.machine.topology import read_topology
from sartor.report import machine_mapping, show_machine

GIB = 2**30


def plain(machine: Machine, kept: Kept | None = None, width: int = 100) -> str:
    file = io.StringIO()
    show_machine(machine, Console(file=file, width=width, color_system=None), kept)
    return file.getvalue()


def one_line(text: str) -> str:
    return " ".join(text.split())


def rates(scale: float = 1.0) -> DeviceRates:
    return DeviceRates(
        matmul=(
            *(
                MatmulRate(dtype="float32", form="nt", batch=1, m=m, n=768, k=768, flops_per_second=scale * m * 1e9)
                for m in (64, 256)
            ),
            MatmulRate(dtype="bfloat16", form="nt", batch=1, m=256, n=768, k=768, flops_per_second=scale * 812e9),
            MatmulRate(dtype="bfloat16", form="tn", batch=1, m=256, n=768, k=768, flops_per_second=scale * 834e9),
        ),
        memory=(
            MemoryRate(kind="add", dtype="float32", total_bytes=61440, bytes_per_second=scale * 45e9),
            MemoryRate(kind="add", dtype="float32", total_bytes=134209536, bytes_per_second=scale * 77e9),
            MemoryRate(kind="exp", dtype="bfloat16", total_bytes=89477120, bytes_per_second=scale * 23.45e9),
        ),
        attention=(
            AttentionRate(
                dtype="bfloat16",
                form="causal",
                batch=8,
                heads=12,
                length=256,
                head_size=64,
                forward_flops_per_second=321e9,
                backward_flops_per_second=123e9,
            ),
        ),
        loss=(
            LossRate(
                dtype="float32",
                rows=128,
                vocabulary=32_000,
                forward_elements_per_second=1.5e9,
                backward_elements_per_second=2.5e9,
            ),
        ),
        operator_seconds=1.9e-6,
        recorded_operator_seconds=3.6e-6,
        backward_operator_seconds=3.2e-6,
        view_seconds=0.9e-6,
        view_backward_seconds=1.1e-6,
        block_operator_seconds=6.1e-6,
        compiled_block_operator_seconds=None,
        compiled_block_backward_operator_seconds=None,
        block_backward_operator_seconds=5.2e-6,
        adamw_parameters_per_second=2.5e9,
        adamw_tensor_seconds=5e-6,
        first_touch_bytes_per_second=1.5e9 if scale == 1 else None,
    )


def calibration(**changes: Any) -> Calibration:
    return Calibration(version=1, key="A Processor, 8 cores", measured="2026-11-21", seconds=23.4, device=rates(), **changes)


def test_what_is_around_the_processors(make: SimpleNamespace, tmp_path: Path) -> None:
    machine = dataclasses.replace(
        make.machine(accelerators=1),
        topology=read_topology("Intel(R) Xeon(R) CPU Max 9462", xeon_max(tmp_path, mode="flat")),
        disks=(Disk(folder="runs", kind="nvme", filesystem="xfs", total_bytes=2 * 2**40, free_bytes=2**40),),
        networks=(
            Network(name="mlx5_0:1", kind="infiniband", up=True, bytes_per_second=50 * 10**9),
            Network(name="eth0", kind="ethernet", up=False, bytes_per_second=None),
        ),
        links=(DeviceLink(index=0, pcie_generation=5, pcie_lanes=16, host_bytes_per_second=63 * 10**9, numa_node=1, nvlinks=18),),
    )
    said = one_line(plain(machine))
    assert "2 sockets, 64 cores, 128 logical processors" in said
    assert "NUMA node 0 64 logical processors, 256 GiB" in said
    assert "NUMA node 3 no processors, 64.0 GiB of high-bandwidth memory" in said
    assert "as nodes of its own (flat mode)" in said
    assert "runs: 1.00 TiB free of 2.00 TiB (xfs, nvme)" in said
    assert "mlx5_0:1: infiniband, 400 Gbit/s" in said
    assert "eth0: ethernet, down" in said
    assert "PCIe 5 x16, 63 GB/s, 18 NVLinks, at NUMA node 1" in said
    assert said.index("main memory") < said.index("runs") < said.index("computes on")


def test_a_machine_of_the_catalogue() -> None:
    machine = machine_of(lookup("2xp5.48xlarge"))
    said = one_line(plain(machine, Kept(path=None, reason="it is elsewhere")))
    assert "2 nodes of 8 x NVIDIA H100 80GB HBM3, 79.1 GiB each" in said
    assert "bfloat16 989.4" in said
    assert "memory 3,350 GB/s, host link 63 GB/s, links to others 450 GB/s" in said
    assert f"{machine.price_usd_per_hour:.2f} USD/h" in said
    assert "large products 80%, published training runs 41%" in said
    assert "it is elsewhere" in said
    assert "--calibrate" not in said
    assert "processor" not in said


def test_measured_rates(make: SimpleNamespace) -> None:
    measured = calibration(
        disk=DiskRate(folder="runs", direct=True, total_bytes=2**28, write_bytes_per_second=1.2e9, read_bytes_per_second=2.4e9),
        notes=("something is [missing]",),
    )
    text = plain(make.machine(), Kept(path=None, calibration=measured))
    said = one_line(text)
    assert "Rates measured 2026-11-21 in 23 s: A Processor, 8 cores" in said
    assert "768 to 768, rows 64 256 best of all" in said
    assert "float32 64 256 256" in said
    assert "bfloat16 812 834" in said
    assert "up to 60.0 KiB 128 MiB" in said
    assert "add float32 45 77" in said
    assert "exp bfloat16 23.4" in said
    assert "bfloat16 causal 321 / 123" in said
    assert "1.5 / 2.5 G logits/s" in said
    assert "2.5 G parameters/s, 5.0 µs" in said
    assert "1.9 µs; 3.6 µs recorded and 3.2 µs backward" in said
    assert "write 1.2 GB/s, read 2.4 GB/s (runs, direct)" in said
    assert "1.5 GB/s handed out" in said
    assert "something is [missing]" in said


def test_measured_rates_of_an_accelerator_and_what_is_beside_it(make: SimpleNamespace) -> None:
    measured = calibration(
        host=rates(2.0),
        link=LinkRate(to_device_bytes_per_second=50e9, to_host_bytes_per_second=51e9, both_ways_bytes_per_second=90e9),
        collectives=(
            CollectiveRate(name="all_reduce", backend="nccl", ranks=8, alpha_seconds=2e-5, beta_bytes_per_second=200e9),
        ),
    )
    said = one_line(plain(make.machine(accelerators=1), Kept(path=None, calibration=measured)))
    assert "to it 50 GB/s, from it 51 GB/s, both at once 90 GB/s" in said
    assert "all_reduce 20 µs + 200 GB/s, 8 ranks (nccl)" in said
    assert "processor: matrix products" in said
    assert "processor: AdamW" in said


def test_where_there_was_no_time_to_measure_operators(make: SimpleNamespace) -> None:
    measured = calibration()
    measured = dataclasses.replace(measured, device=dataclasses.replace(measured.device, memory=(), attention=(), matmul=()))
    said = one_line(plain(make.machine(), Kept(path=None, calibration=measured)))
    assert "2.5 G parameters/s" in said
    assert "up to" in said


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_width_is_kept(make: SimpleNamespace, width: int) -> None:
    text = plain(make.machine(), Kept(path=None, calibration=calibration()), width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_nothing_measured_says_how(make: SimpleNamespace) -> None:
    said = one_line(plain(make.machine(), Kept(path=None, reason="not measured yet")))
    assert "not measured yet; `sartor machine --calibrate`" in said


def test_nothing_writes_escapes(make: SimpleNamespace) -> None:
    machine = dataclasses.replace(
        make.machine(), cpu_name="A\x1b[2J", disks=(Disk(folder="\x1b", kind="", filesystem="", total_bytes=1, free_bytes=1),)
    )
    assert "\x1b" not in plain(machine, Kept(path=None, reason="\x1b", calibration=calibration(notes=("\x1b",))))


def test_json_has_everything(make: SimpleNamespace) -> None:
    measured = calibration()
    tree = json.loads(json.dumps(machine_mapping(make.machine(accelerators=2), Kept(path=None, calibration=measured))))
    assert tree["schema_version"] == 1
    assert tree["calibration_missing"] == ""
    assert len(tree["machine"]["accelerators"]) == 2
    assert tree["calibration"]["device"]["matmul"][0]["flops_per_second"] == measured.device.matmul[0].flops_per_second
    tree = machine_mapping(probe(MachineJob(name="L40S-48GB")), Kept(path=None, reason="no"))
    assert (tree["calibration"], tree["calibration_missing"]) == (None, "no")
    assert tree["machine"]["rates"]["peak_flops_per_second"]["bfloat16"] == 362e12
