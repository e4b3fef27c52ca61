"""Full fine-tuning of models that a CUDA device cannot hold, beside what it does when it can, and beside others' offload.

    python benchmarks/gpu/placement.py                     # every case, each in a process of its own
    python benchmarks/gpu/placement.py --only 8b-24 8b     # some of them
    python benchmarks/gpu/placement.py --case 8b-24        # one case in this process: a line of JSON

The device is capped (`torch.cuda.set_per_process_memory_fraction`) at the gibibytes in a case's name. Weights are random, in
bfloat16 with the residual of a float32 master, AdamW is exact, activations are recomputed; 32,768 tokens a step in rows of 4,096.
`largest` has as many layers as main memory and disk hold. Of 18B, exact states are 240 GiB: its moments have 8 bits, and its
weights no residual.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import save
from sartor.data.pack import step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.kernels.adam import RESIDUAL
from sartor.machine import probe
from sartor.machine.memory import peak_resident_bytes
from sartor.placement import DiskTier, Engine, PlacedStep, find_rows
from sartor.placement.fill import put
from sartor.plan.table import Sizes, Table, less_and_less, uniform
from sartor.step import Precision, TensorBatch, TrainStep, make_step, make_trainable
from sartor.step.loss import SumLoss

GIB = 2**30
TOKENS, LENGTH = 32768, 4096
STEPS = 3
STATE_BYTES, COMPACT_STATE_BYTES, HOST_BYTES = 10, 2.04, 14
"""A parameter: residual and moments; moments in 8 bits with their scales; an exact one with its weight and gradient."""
HOST_SHARE = 0.9
"""Of the main memory that is available, for weights, gradients and state."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    sizes: dict[str, int]
    cap: int | None
    """Gibibytes of the device."""
    micro_batch: int
    """Rows."""
    engine: str = "sartor"
    compact: bool = False
    """Not exact: moments in 8 bits, and bfloat16 weights that are rounded by chance, without a residual."""


_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_18B = {"hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 92544}
_1B = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
CASES = [
    Case("8b", _8B | {"num_hidden_layers": 32}, None, 8, "plain"),
    Case("8b-24", _8B | {"num_hidden_layers": 32}, 24, 8),
    Case("18b-24", _18B | {"num_hidden_layers": 44}, 24, 2, compact=True),
    Case("largest-24", _8B | {"num_hidden_layers": 0}, 24, 8),
    Case("1.5b", _1B | {"num_hidden_layers": 28}, None, 2, "plain"),
    Case("1.5b-6", _1B | {"num_hidden_layers": 28}, 6, 2),
    Case("1.5b-6-fsdp2", _1B | {"num_hidden_layers": 28}, 6, 1, "fsdp2"),
    Case("1.5b-6-deepspeed", _1B | {"num_hidden_layers": 28}, 6, 1, "deepspeed"),
    Case("8b-24-fsdp2", _8B | {"num_hidden_layers": 32}, 24, 1, "fsdp2"),
]
RATIOS = [
    ("8b-24", "8b"), ("1.5b-6", "1.5b"), ("1.5b-6", "1.5b-6-fsdp2"), ("1.5b-6", "1.5b-6-deepspeed"), ("8b-24", "8b-24-fsdp2"),
]  # fmt: skip


def config(case: Case) -> LlamaConfig:
    return LlamaConfig(**case.sizes, tie_word_embeddings=False, max_position_embeddings=LENGTH, attn_implementation="sdpa")


def batches(step: int, micro_batch: int, vocabulary: int) -> tuple[list[TensorBatch], int]:
    random = np.random.default_rng(step)
    samples = [
        Sample(input_ids=random.integers(3, vocabulary, LENGTH), trained=np.ones(LENGTH, bool), source="random")
        for _ in range(TOKENS // LENGTH)
    ]
    cut = step_batches(
        TokenSet.from_samples(samples), np.arange(len(samples)), pad_id=0, capacity=LENGTH, packing=False, micro_batch=micro_batch
    )
    return [TensorBatch.of(batch, "cuda") for batch in cut], sum(batch.trained_tokens for batch in cut)


# -- Sartor


def fill(parameters: Mapping[str, nn.Parameter], *, residuals: bool = True) -> None:
    """Random weights of a row, made on the device; their residuals, all zero, in main memory."""
    for parameter in parameters.values():
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        put(parameter, values.normal_(0, 0.02) if parameter.ndim > 1 else values.fill_(1))
        if residuals:
            setattr(parameter, RESIDUAL, torch.zeros(parameter.shape, dtype=torch.int16))


def empty_model(case: Case) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM._from_config(config(case), dtype=torch.bfloat16)


def step_of(model: nn.Module, case: Case) -> TrainStep:
    training = {"optimizer": "adamw-8bit" if case.compact else "adamw"}
    job = from_mapping({"model": "unused", "data": "unused", "method": "full", "training": training})
    precision = Precision.of("bf16-master")
    if case.compact:
        precision = replace(Precision.of("bf16"), rounding="stochastic")
    trainable = make_trainable(model, job, precision, recompute=True, seed=0)
    step = make_step(trainable, job, precision, device_kind="cuda")
    step.loss = SumLoss(trainable, device_kind="cpu")  # head and loss in chunks, which need no matrix of all logits
    return step


def table_of(sizes: list[Sizes], folder: str) -> Table:
    """Everything in main memory, or what does not fit there on disk. Exits where the disk is too small."""
    room, table = int(HOST_SHARE * probe().host.available_bytes), uniform(sizes, "host")
    need = table.tier_bytes(sizes, "host")
    if need <= room:
        return table
    whole = uniform(sizes, "device")
    for on_disk in less_and_less(sizes, "disk", whole):
        if on_disk.kept_bytes(sizes) <= room and on_disk.tier_bytes(sizes, "disk") <= 0.9 * shutil.disk_usage(folder).free:
            places = [
                replace(row, **{k: "host" for k in ("weights", "gradients", "state") if getattr(row, k) == "device"})
                for row in on_disk.rows
            ]
            return Table(rows=tuple(places))
    raise SystemExit(f"{need / GIB:.0f} GiB do not fit in {room / GIB:.0f} GiB of main memory and the disk")


def placed(case: Case, folder: str) -> PlacedStep:
    model = empty_model(case)
    rows = find_rows(model)
    gradient_bytes = 4 if case.micro_batch * LENGTH < TOKENS and not case.compact else 2
    state_bytes = COMPACT_STATE_BYTES if case.compact else STATE_BYTES
    sizes = [Sizes.of(row, state_bytes=state_bytes, gradient_bytes=gradient_bytes) for row in rows]
    table = table_of(sizes, folder)
    made = functools.partial(fill, residuals=not case.compact)
    engine = Engine(model, rows, table, {"disk": DiskTier(Path(folder))}, fill=made, device=torch.device("cuda"))
    return PlacedStep(step_of(model, case), engine)


def plain(case: Case, folder: str) -> TrainStep:
    model = empty_model(case)
    fill(dict(model.named_parameters()))
    for parameter in model.parameters():
        setattr(parameter, RESIDUAL, vars(parameter)[RESIDUAL].cuda())
    return step_of(model.cuda(), case)


def with_most_layers(case: Case, folder: str) -> Case:
    """As many as weights, gradients and state have room for."""
    host = HOST_SHARE * probe().host.available_bytes + 0.9 * shutil.disk_usage(folder).free
    width, inner = case.sizes["hidden_size"], case.sizes["intermediate_size"]
    layer = width * (2 * width + 2 * width * case.sizes["num_key_value_heads"] // case.sizes["num_attention_heads"] + 3 * inner)
    layers = int(0.97 * host / HOST_BYTES - 2 * width * case.sizes["vocab_size"]) // layer
    return replace(case, sizes=case.sizes | {"num_hidden_layers": layers})


class Sartor:
    """A step of ours."""

    def __init__(self, case: Case, folder: str) -> None:
        self.step = placed(case, folder) if case.engine == "sartor" else plain(case, folder)

    def __call__(self, cut: list[TensorBatch], tokens: int) -> float:
        gradients = self.step.backward(cut, tokens)
        self.step.update(1e-5)
        return float(torch.stack(gradients.losses).sum()) / tokens


# -- others


def loss_of(model: Any, batch: TensorBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids_RT, labels=batch.input_ids_RT, use_cache=False).loss


class Fsdp2:
    """PyTorch's `CPUOffloadPolicy`: float32 masters in main memory, cast after the copy; the update on host cores."""

    def __init__(self, case: Case, folder: str) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507", "RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
        with torch.device("cpu"):
            model = LlamaForCausalLM(config(case))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        options = {"offload_policy": CPUOffloadPolicy(), "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        for block in model.model.layers:
            fully_shard(block, **options)
        self.model = fully_shard(model, **options).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def __call__(self, cut: list[TensorBatch], tokens: int) -> float:
        total = 0.0
        for batch in cut:
            loss = loss_of(self.model, batch) / len(cut)
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class DeepSpeed:
    """ZeRO-3 with parameters and optimizer in main memory (`DeepSpeedCPUAdam`)."""

    def __init__(self, case: Case, folder: str) -> None:
        import deepspeed

        model = LlamaForCausalLM(config(case))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        place = {"device": "cpu", "pin_memory": True}
        settings = {
            "train_micro_batch_size_per_gpu": case.micro_batch,
            "gradient_accumulation_steps": TOKENS // LENGTH // case.micro_batch,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "zero_optimization": {"stage": 3, "offload_param": place, "offload_optimizer": place, "overlap_comm": True},
        }
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]

    def __call__(self, cut: list[TensorBatch], tokens: int) -> float:
        total = 0.0
        for batch in cut:
            loss = loss_of(self.engine, batch)
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss) / len(cut)
        return total


ENGINES = {"sartor": Sartor, "plain": Sartor, "fsdp2": Fsdp2, "deepspeed": DeepSpeed}


def measure(case: Case) -> dict[str, Any]:
    """Steps of one case in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(probe().cores)
    if case.cap is not None:
        torch.cuda.set_per_process_memory_fraction(case.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        if not case.sizes["num_hidden_layers"]:
            case = with_most_layers(case, folder)
        step = ENGINES[case.engine](case, folder)
        seconds, losses = [], []
        for number in range(1 + STEPS):
            cut, tokens = batches(number, case.micro_batch, case.sizes["vocab_size"])
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(step(cut, tokens))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result: dict[str, Any] = {"layers": case.sizes["num_hidden_layers"], "losses": losses, "step_seconds": seconds[1:]}
        result["tokens_per_second"] = TOKENS / statistics.median(seconds[1:])
        result["allocated_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
        result["resident_bytes"] = peak_resident_bytes()
        inner = getattr(step, "step", None)
        if isinstance(inner, PlacedStep):
            mover = inner.engine.mover
            result["parameters"] = sum(parameter.numel() for parameter in inner.model.parameters())
            result["moved_bytes_per_step"] = (mover.read_bytes + mover.written_bytes) // (1 + STEPS)
            result["tiers"] = {name: tier.peak_bytes for name, tier in inner.engine.tiers.items()}
            result["shortages"] = inner.engine.shortages
        return result


def in_a_process(case: Case) -> dict[str, Any]:
    if case.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return {"status": "deepspeed is not installed"}
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, __file__, "--case", case.name], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"status": "failed", "error": done.stderr[-2000:]}
    return {"status": "measured", **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--case", choices=names)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(next(case for case in CASES if case.name == arguments.case))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    results = {}
    for case in CASES:
        if case.name in arguments.only:
            results[case.name] = in_a_process(case)
            print(case.name, {key: value for key, value in results[case.name].items() if key != "losses"}, flush=True)
    for one, other in RATIOS:
        rates = [results.get(name, {}).get("tokens_per_second") for name in (one, other)]
        if all(rates):
            print(f"{one}: {rates[0] / rates[1]:.1%} of the rate of {other}")
    print(save("gpu-placement", results, note=f"{TOKENS} tokens a step, the device capped at the GiB in a case's name"))


if __name__ == "__main__":
    main()
