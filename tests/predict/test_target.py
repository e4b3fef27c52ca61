"""Forecasts for devices that are not here: the same trace, the device's workspaces and allocator."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
from sartor.errors import DoesNotFit, JobError, UsageError
from sartor.job.schema import MachineJob
from sartor.machine import probe
from sartor.predict import cuda
from sartor.predict.cuda import attention_kernel
from sartor.predict.ledger import Event, Ledger
from sartor.predict.target import Target
from sartor.predict.tracker import StorageTracker


@pytest.fixture
def synthetic(job_tree: dict[str, Any]) -> dict[str, Any]:
    """Planned from the configuration alone: no data, no tokenizer, no weights."""
    job_tree["model"] = job_tree["model"] + "/config.json"
    return {**job_tree, "data": {"synthetic": {"length": 100, "examples": 16}}, "machine": "L40S-48GB"}


def test_four_numbers_for_an_accelerator(synthetic: dict[str, Any]) -> None:
    forecast = sartor.plan(synthetic).forecast
    assert forecast.peak is not None
    assert forecast.allocated_bytes is not None
    assert forecast.active_bytes is not None
    assert forecast.reserved_bytes is not None
    assert forecast.process_bytes is not None
    assert forecast.peak.total_bytes < forecast.allocated_bytes <= forecast.active_bytes
    assert forecast.active_bytes <= forecast.reserved_bytes < forecast.process_bytes
    assert forecast.reserved_bytes % 2**21 == 0
    parts = forecast.baseline_bytes + forecast.allocator_bytes + forecast.peak.total_bytes
    assert parts == forecast.process_bytes
    assert forecast.verdict == "fits"


def test_the_card_decides_what_fits(synthetic: dict[str, Any]) -> None:
    synthetic["training"]["global_batch"] = 64
    synthetic["data"]["synthetic"] |= {"examples": 128}
    synthetic["strategy"] = {"recompute": "none"}
    roomy = sartor.plan(synthetic)
    assert roomy.strategy.micro_batch == 64
    assert roomy.forecast.reserved_bytes is not None
    limit = roomy.forecast.baseline_bytes + roomy.forecast.reserved_bytes // 2
    short = sartor.plan({**synthetic, "machine": {"name": "L40S-48GB", "device_memory": limit}})
    assert short.strategy.micro_batch < 64
    assert short.rejected
    with pytest.raises(DoesNotFit, match="runs out"):
        sartor.plan({**synthetic, "machine": {"name": "L40S-48GB", "device_memory": "460MiB"}})


def test_a_plan_for_another_machine_does_not_run_here(synthetic: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="plan is for L40S-48GB"):
        sartor.train(synthetic)


@pytest.mark.parametrize(("name", "remedy"), [("L40-48", "L40S-48GB"), ("Gaudi2-96GB", "CUDA")])
def test_machines_that_cannot_be_planned_for(name: str, remedy: str) -> None:
    with pytest.raises(JobError) as refused:
        probe(MachineJob(name=name))
    assert remedy in str(refused.value)


def test_the_workspace_comes_with_the_first_product_and_stays() -> None:
    events = [
        Event(storage=0, size_bytes=512, phase="build"),
        Event(storage=1, size_bytes=1024, phase="step 1: forward and backward"),
    ]
    with_workspace = Target(kind="cuda", sm=80).with_workspace(Ledger(events=events))
    assert [event.size_bytes for event in with_workspace] == [512, 8_519_680, 8_519_680, 1024]
    assert Target(kind="cuda", sm=90).workspace_bytes == 2 * 32 * 2**20
    assert list(Target(kind="cpu").with_workspace(Ledger(events=events))) == events


def test_attention_takes_scratch_memory_in_backward() -> None:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    query, key = torch.empty(2, 8, 100, 40, dtype=torch.bfloat16), torch.empty(2, 4, 100, 40, dtype=torch.bfloat16)
    expanded = 2 * 2 * 8 * 100 * 40 * 2
    flash = 4 * 2 * 8 * 128 * 64 + 4 * 2 * 8 * 128 + expanded
    assert Target(kind="cuda", sm=80).transient_bytes(backward, (None, query, key, key)) == flash
    cudnn = 4 * 2 * 8 * 100 * 41 + expanded
    assert Target(kind="cuda", sm=90).transient_bytes(backward, (None, query, key, key)) == cudnn
    assert Target(kind="cpu").transient_bytes(backward, (None, query, key, key)) == 0


def test_memory_efficient_attention_takes_scratch_memory() -> None:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    turing = Target(kind="cuda", sm=75)
    # Two blocks of 64 rows, 64 columns and a lock of 16 bytes; and a row sum.
    query = torch.empty(2, 8, 100, 64, dtype=torch.float16)
    workspace = 4 * 2 * 8 * 2 * (64 * 64 + 4)
    assert turing.transient_bytes(backward, (None, query, query, query)) == workspace + 4 * 2 * 8 * 100
    assert turing.transient_bytes(forward, (query, query, query)) == 0
    # Wide heads are summed up in float32 in forward, and their dK and dV in memory: 200 // 16 splits at most, here 2.
    wide = torch.empty(2, 8, 100, 256, dtype=torch.float16)
    assert turing.transient_bytes(forward, (wide, wide, wide)) == 4 * 2 * 8 * 100 * 256
    floats = 4 * (128 * 64 + 4) + 2 * 64 * (256 + 256)
    assert turing.transient_bytes(backward, (None, wide, wide, wide)) == 4 * 2 * 8 * (floats + 100)


def heads(count: int, *, length: int = 128, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.rand(2, count, length, width).to(dtype)


@pytest.mark.parametrize(
    ("sm", "query", "key", "options", "kernel"),
    [
        (80, heads(8), heads(8), {"causal": True}, "flash"),
        (80, heads(8), heads(2), {"causal": True, "grouped": True}, "flash"),
        (80, heads(8), heads(2), {"causal": True}, "math"),
        (80, heads(8), heads(8), {"masked": True}, "efficient"),
        (80, heads(8), heads(8, length=80), {"causal": True}, "efficient"),
        (80, heads(8, dtype=torch.float32), heads(8, dtype=torch.float32), {}, "efficient"),
        (80, heads(8, dtype=torch.float32), heads(2, dtype=torch.float32), {"grouped": True}, "math"),
        (80, heads(8, width=512), heads(8, width=512), {}, "efficient"),
        (80, heads(8, width=12), heads(8, width=12), {"masked": True}, "math"),
        (86, heads(8, width=208), heads(8, width=208), {}, "efficient"),
        (90, heads(8), heads(2), {"causal": True, "grouped": True}, "cudnn"),
        (90, heads(8), heads(8), {"masked": True}, "cudnn"),
        (90, heads(8), heads(8), {"dropout": 0.1}, "flash"),
        (90, heads(8, width=256), heads(8, width=256), {}, "flash"),
        (75, heads(8, dtype=torch.float16), heads(8, dtype=torch.float16), {"causal": True}, "efficient"),
        (75, heads(8), heads(8), {"causal": True}, "math"),
    ],
)
def test_which_attention_kernel_runs(
    sm: int, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any], kernel: str
) -> None:
    assert attention_kernel(sm, query, key, key, **{"masked": False, **options}) == kernel


def test_grouped_float32_attention_has_no_kernel_on_cuda() -> None:
    """Its score matrices are written out, where the CPU's kernel writes none."""
    functional = torch.nn.functional
    query, key = (heads(count, dtype=torch.float32).requires_grad_() for count in (8, 2))
    for rules, square in ((Target(kind="cpu"), False), (Target(kind="cuda", sm=80), True)):
        with StorageTracker() as tracker, rules.rules():
            functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).sum().backward()
        sizes = [event.size_bytes for event in tracker.ledger.events]
        assert (4 * 2 * 8 * 128 * 128 in sizes) is square
    plain = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    with Target(kind="cuda", sm=80).rules():
        other = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(plain, other)


def test_dropout_keeps_bytes_on_cuda_and_is_part_of_the_attention_kernel() -> None:
    tensor = torch.ones(64, 64, requires_grad=True)
    query = heads(8).requires_grad_()
    with StorageTracker() as tracker, Target(kind="cuda", sm=80).rules():
        kept = torch.nn.functional.dropout(tensor, 0.5)
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.1, is_causal=True)
        live = sorted(event.size_bytes for event in tracker.ledger.events if event.size_bytes > 0)
        assert attended.shape == query.shape
    assert 64 * 64 in live
    assert live.count(4 * 64 * 64) == 1
    assert 2 * 2 * 8 * 128 * 128 not in live
    assert set(kept.unique().tolist()) <= {0.0, 2.0}
    assert torch.nn.functional.dropout(tensor, 0.5, training=False) is not kept


def test_autocast_computes_in_float32_what_cuda_does() -> None:
    half, weight = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    operators = {
        "layer_norm": lambda: torch.nn.functional.layer_norm(half, (8,), weight),
        "softmax": lambda: torch.softmax(half, -1),
        "pow": lambda: half**2,
        "sum": half.sum,
        "rsqrt": half.rsqrt,
    }
    for name, operator in operators.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert operator().dtype == torch.bfloat16, name
            with Target(kind="cuda", sm=80).rules():
                assert operator().dtype == torch.float32, name
                assert torch.softmax(half, -1, dtype=torch.bfloat16).dtype == torch.bfloat16
                assert half.mean().dtype == torch.bfloat16
                assert (half @ half.T).dtype == torch.bfloat16
                assert torch.ones(2, dtype=torch.int64).sum().dtype == torch.int64
            assert operator().dtype == torch.bfloat16, name
    with Target(kind="cuda", sm=80).rules():
        assert half.sum().dtype == torch.bfloat16


def test_the_list_of_autocast_is_that_of_pytorch() -> None:
    """The header that comes with PyTorch says what CUDA computes in float32; the CPU's autocast does a part of it by itself."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.is_file():
        pytest.skip("this PyTorch comes without headers")
    text = header.read_text(encoding="utf-8")
    for macro, names in (("AT_FORALL_FP32", cuda._IN_FLOAT32), ("AT_FORALL_FP32_SET_OPT_DTYPE", cuda._TO_FLOAT32)):
        found = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.DOTALL)
        assert found is not None
        listed = {name.replace(", ", ".") for name in re.findall(r"_\(([^)]*)\)", found[1])}
        by_itself = {name for name in listed if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU")}
        assert set(names) == listed - by_itself


def test_mixed_precision_of_gpt2_takes_more_on_cuda(tmp_path: Path) -> None:
    """Its frozen norms compute in float32 there, and so what they hand on."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_embd": 64, "n_layer": 3}
    config |= {"n_head": 4, "n_positions": 256, "bos_token_id": None, "eos_token_id": None}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    job = {
        "model": str(tmp_path / "config.json"),
        "data": {"synthetic": {"length": 256, "examples": 4}, "packing": False},
        "method": "lora",
        "precision": "bf16-mixed",
        "machine": "L40S-48GB",
        "strategy": {"micro_batch": 4, "recompute": "none"},
    }
    forecast = sartor.plan(job).forecast
    assert forecast.peak is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "rules", lambda self: contextlib.nullcontext())
        without = sartor.plan(job).forecast
    assert without.peak is not None
    assert forecast.peak.total_bytes > 1.05 * without.peak.total_bytes


def test_synthetic_examples_must_fit_and_are_not_given_with_a_file(synthetic: dict[str, Any]) -> None:
    synthetic["data"]["synthetic"]["length"] = 4096
    with pytest.raises(JobError, match="128 positions"):
        sartor.plan(synthetic)
    synthetic["data"]["path"] = "train.jsonl"
    with pytest.raises(JobError, match="both"):
        sartor.plan(synthetic)


def test_cuda_needs_room_for_a_product_in_the_softmax_gradient() -> None:
    gradient = torch.zeros(2, 3, 64, 64)
    arguments = (gradient, torch.zeros_like(gradient), -1, torch.float32)
    backward = torch.ops.aten._softmax_backward_data.default
    assert Target(kind="cuda", sm=75).transient_bytes(backward, arguments) == 4 * gradient.numel()
    assert Target(kind="cpu").transient_bytes(backward, arguments) == 0
