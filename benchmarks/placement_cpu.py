"""How much slower a placed step is than the plain one, on a CPU: states at 40 % of their size in memory, the rest on a tier.

    python benchmarks/placement_cpu.py               # speed: plain, lower tier in memory, lower tier on disk
    python benchmarks/placement_cpu.py --exact 50    # so many steps of a small model: losses and weights equal to the bit

The same training step as `sartor train` takes, in float32, on random tokens; 8192 tokens a step in two micro-batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import save
from sartor.data.pack import step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.model.rows import find_rows
from sartor.placement import DiskTier, Engine, HostTier, PlacedStep
from sartor.plan.table import Sizes, uniform, within
from sartor.step import Precision, TensorBatch, TrainStep, make_step, make_trainable

SHARE = 0.4
TIERS = ("host", "disk")


def make(layers: int, width: int, *, mode: str = "float32", method: str = "full") -> TrainStep:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": 12, "num_key_value_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_hidden_layers=layers, tie_word_embeddings=True, **sizes))
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "lora": {"rank": 4}})
    precision = Precision.of(mode)
    trainable = make_trainable(model, job, precision, recompute=False, seed=0)
    return make_step(trainable, job, precision, device_kind="cpu")


def batches(step: int, *, examples: int, length: int, micro_batch: int) -> tuple[list[TensorBatch], int]:
    random = np.random.default_rng(step)
    samples = [
        Sample(input_ids=random.integers(3, 8192, length), trained=np.ones(length, bool), source="random")
        for _ in range(examples)
    ]
    cut = step_batches(
        TokenSet.from_samples(samples), np.arange(examples), pad_id=0, capacity=length, packing=False, micro_batch=micro_batch
    )
    return [TensorBatch.of(batch, "cpu") for batch in cut], sum(batch.trained_tokens for batch in cut)


def place(step: TrainStep, tier: str, folder: str, *, share: float | None = SHARE) -> PlacedStep:
    rows = find_rows(step.model)
    sizes = [Sizes.of(row, state_bytes=10 if step.precision.masters else 8) for row in rows]
    whole = sum(size.total for size in sizes)
    table = uniform(sizes, tier) if share is None else within(sizes, int(share * whole), tier)
    if table is None:
        raise SystemExit("the budget is too small for the largest row: more layers")
    limit = None if share is None else int(share * whole) - table.kept_bytes(sizes)
    tiers = {"host": HostTier()} if tier == "host" else {"disk": DiskTier(Path(folder))}
    return PlacedStep(step, Engine(step.model, rows, table, tiers, limit=limit))


def disk_rate(folder: str) -> float:
    """Bytes a second that the disk tier reads and writes, half and half, by its own threads."""
    from sartor.placement.tiers import Mover

    tier, mover, size = DiskTier(Path(folder)), Mover(), 2**29
    memory = torch.zeros(size, dtype=torch.uint8)
    region = tier.allocate(size)
    start = time.perf_counter()
    for copies in (mover.write(tier, region, memory.untyped_storage()), mover.read(tier, region, memory.untyped_storage())):
        for copy in copies:
            copy.result()
    seconds = time.perf_counter() - start
    mover.close()
    tier.close()
    return 2 * size / seconds


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, dict]:
    """Steps of all three in turn on the same batches, so that what slows the machine meets all of them; the first warms up."""
    names = ("plain", *TIERS)
    steps = {name: make(arguments.layers, 768) for name in names}
    steps |= {tier: place(steps[tier], tier, folder) for tier in TIERS}
    results: dict[str, dict] = {name: {"step_seconds": []} for name in names}
    for number in range(1 + arguments.steps):
        cut, tokens = batches(number, examples=8, length=1024, micro_batch=4)
        for name in names:
            moved = moved_bytes(steps[name])
            start = time.perf_counter()
            steps[name].backward(cut, tokens)
            steps[name].update(1e-4)
            seconds = time.perf_counter() - start
            print(f"step {number} {name}: {seconds:.2f} s", flush=True)
            if number > 0:
                results[name]["step_seconds"].append(seconds)
                results[name]["moved_bytes_per_step"] = moved_bytes(steps[name]) - moved
    for name, result in results.items():
        pairs = zip(results["plain"]["step_seconds"], result["step_seconds"], strict=True)
        result["of_plain_rate"] = statistics.median(plain / seconds for plain, seconds in pairs)
        result["tokens_per_second"] = 8192 / statistics.median(result["step_seconds"])
        if name in TIERS:
            result["device_peak_bytes"] = steps[name].engine.gauge.peak_bytes
        print(name, {key: value for key, value in result.items() if key != "step_seconds"}, flush=True)
    return results


def moved_bytes(step: TrainStep | PlacedStep) -> int:
    """Between the tiers, both ways, so far."""
    return step.engine.mover.read_bytes + step.engine.mover.written_bytes if isinstance(step, PlacedStep) else 0


def exact(steps: int, folder: str) -> dict:
    """Losses and weights after so many steps, placed and plain."""
    results = {}
    for mode, method, micro_batch in (("float32", "full", 4), ("bf16-master", "full", 1), ("float32", "lora", 2)):
        plain = make(4, 96, mode=mode, method=method)
        placed = {tier: place(make(4, 96, mode=mode, method=method), tier, folder, share=None) for tier in ("host", "disk")}
        equal = dict.fromkeys(placed, True)
        for number in range(steps):
            cut, tokens = batches(number, examples=4, length=64, micro_batch=micro_batch)
            wanted = plain.backward(cut, tokens)
            plain.update(1e-3)
            for tier, step in placed.items():
                got = step.backward(cut, tokens)
                step.update(1e-3)
                equal[tier] &= all(map(torch.equal, wanted.losses, got.losses)) and torch.equal(wanted.norm, got.norm)
        for tier, step in placed.items():
            step.engine.detach()
            equal[tier] &= all(torch.equal(p, step.parameters[name]) for name, p in plain.parameters.items())
        results[f"{mode} {method}, {4 // micro_batch} micro-batches"] = equal
        print(mode, method, equal, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", type=int, default=0, help="compare so many steps with the plain ones instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.exact:
            print(save("placement-exact", exact(arguments.exact, folder), note=f"{arguments.exact} steps"))
            return
        results = measure(arguments, folder)
        results["disk_bytes_per_second"] = rate = disk_rate(folder)
        for tier in TIERS:
            print(f"{tier}: {results[tier]['of_plain_rate']:.1%} of the plain rate, median of steps in turn")
        alone = results["disk"]["moved_bytes_per_step"] / rate
        print(f"disk: {rate / 1e9:.2f} GB/s by itself, {alone:.1f} s a step for what moves")
        print(save("placement-cpu", results, note=f"{SHARE:.0%} of the states in memory, {arguments.layers} layers"))


if __name__ == "__main__":
    main()
