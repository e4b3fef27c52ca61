"""A full fine-tune whose weights, gradients and optimizer state are more than twice the memory that the process may have.

    python benchmarks/placement_capacity.py                  # 4 GiB (RLIMIT_DATA), AdamW in float32, lower tier on disk
    python benchmarks/placement_capacity.py --check          # the same steps without placement and limit: losses to the bit
    python benchmarks/placement_capacity.py --job            # the same as a job of `sartor train`: forecasts beside measurements
    python benchmarks/placement_capacity.py --large          # a job of three billion parameters, bf16-master, all memory there is

Writes a model of random weights, streams it into its places, and takes a few steps with PyTorch's fused AdamW, clipping on.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save

GIB = 2**30


def config(layers: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=16384, hidden_size=1536, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip


def large_config():
    """3.0 billion parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=29, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def empty_model(layers: int):
    """Parameters on the meta device, buffers in memory."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config(layers))
    model.tie_weights()
    return model


def write_model(folder: Path, layers: int) -> int:
    """Random weights, one file a tensor; the number of parameters."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = 0
    for number, (name, parameter) in enumerate(empty_model(layers).named_parameters()):
        values = torch.ones(parameter.shape) if "norm" in name else 0.02 * torch.randn(parameter.shape, generator=generator)
        data = values.numpy().tobytes()
        header = json.dumps({name: {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, len(data)]}}).encode()
        (folder / f"model-{number:05}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
        count += values.numel()
    return count


def child(arguments: argparse.Namespace) -> None:
    """Train, within the limit; prints what was measured as JSON."""
    if arguments.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(arguments.limit * GIB), int(arguments.limit * GIB)))
    import torch

    import sartor
    from sartor.machine.memory import peak_resident_bytes

    torch.set_num_threads(2)
    model = empty_model(arguments.layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    start = time.perf_counter()
    if arguments.limit:
        model, optimizer = sartor.prepare(
            model, optimizer, policy="auto", budget=int(arguments.budget * GIB), lower="disk", weights=arguments.folder,
            folder=arguments.folder, activations="disk",
        )  # fmt: skip
    else:
        from sartor.placement.fill import from_folder

        from_folder(Path(arguments.folder), model)(dict(model.named_parameters()))
    print(f"loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    losses, seconds = [], []
    for step in range(arguments.steps):
        start = time.perf_counter()
        ids = torch.randint(0, 16384, (1, arguments.tokens), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [float(loss).hex(), float(norm).hex()]
        seconds.append(time.perf_counter() - start)
        print(f"step {step + 1}: loss {float(loss):.4f}, {seconds[-1]:.1f} s", file=sys.stderr)
    result = {"losses_and_norms": losses, "step_seconds": seconds, "peak_resident_bytes": peak_resident_bytes()}
    if arguments.limit:
        engine = optimizer.engine
        result |= {
            "device_peak_bytes": engine.gauge.peak_bytes,
            "disk_peak_bytes": engine.tiers["disk"].peak_bytes,
            "direct": engine.tiers["disk"].direct,
            "read_bytes": engine.mover.read_bytes,
            "written_bytes": engine.mover.written_bytes,
        }
    print(json.dumps(result))


def job(arguments: argparse.Namespace) -> None:
    """Plan and train a job whose `host_memory` is the limit; prints forecasts and measurements as JSON."""
    from transformers import AutoTokenizer

    import sartor
    from sartor.placement import DiskTier

    folder = Path(arguments.folder)
    (large_config() if arguments.large else config(arguments.layers)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(sartor.__file__).parent / "demo/model").save_pretrained(folder)
    tiers: list[DiskTier] = []
    opened = DiskTier.__init__

    def note(tier: DiskTier, where: Path) -> None:
        opened(tier, where)
        tiers.append(tier)

    DiskTier.__init__ = note  # type: ignore[method-assign]
    plan = sartor.plan(
        {
            "model": {"path": arguments.folder, "random_weights": arguments.large},
            "data": {"synthetic": {"length": arguments.tokens // 4, "examples": 64}},
            "method": "full",
            "precision": "bf16-master" if arguments.large else "float32",
            "training": {"max_steps": arguments.steps, "global_batch": 4, "tensorboard": False},
            "evaluation": {"generate": 0},
            "machine": {"device": "cpu"} | ({} if arguments.large else {"host_memory": int(arguments.limit * GIB)}),
            "output": str(folder / "run"),
        }
    )
    print(plan.strategy.describe(), plan.forecast.reason, file=sys.stderr)
    start = time.perf_counter()
    memory = sartor.train(plan).memory
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "parameters": plan.trained_parameters,
        "losses": [line["loss"] for line in metrics if "tokens_per_second" in line],
        "tokens_per_second": [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line],
        "seconds": time.perf_counter() - start,
        "strategy": plan.strategy.describe(),
        "forecast_bytes": memory.forecast_bytes,
        "peak_resident_bytes": memory.measured_bytes,
        "error_percent": memory.error_percent,
        "disk_forecast_bytes": plan.strategy.placement.disk_bytes,
        "disk_peak_bytes": max(tier.peak_bytes for tier in tiers),
    }
    result["disk_error_percent"] = (result["disk_forecast_bytes"] / result["disk_peak_bytes"] - 1) * 100
    print(json.dumps(result))


def run(arguments: argparse.Namespace, folder: str, limit: float) -> dict:
    command = [sys.executable, __file__, "--child", "--folder", folder, "--limit", str(limit)]
    command += [flag for flag, given in (("--job", arguments.job), ("--large", arguments.large)) if given]
    for name in ("layers", "steps", "tokens", "budget"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of memory that the process may have")
    parser.add_argument("--budget", type=float, default=2.0, help="GiB of weights, gradients and optimizer state in memory")
    parser.add_argument("--check", action="store_true", help="compare with the same steps without placement")
    parser.add_argument("--job", action="store_true", help="as a job, forecasts beside measurements")
    parser.add_argument("--large", action="store_true", help="a job of three billion parameters")
    parser.add_argument("--folder", default="")
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        job(arguments) if arguments.job else child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.large:
            arguments.job = True
            result = run(arguments, folder, 0)
            print(json.dumps(result, indent=1))
            print(save("placement-large", result, note=f"{arguments.tokens} tokens a step, {arguments.steps} steps"))
            return
        parameters = write_model(Path(folder), arguments.layers)
        states = 16 * parameters
        print(f"{parameters / 1e6:.0f} million parameters: states of {states / GIB:.2f} GiB, limit {arguments.limit:g} GiB")
        placed = run(arguments, folder, arguments.limit)
        results = {"parameters": parameters, "states_bytes": states, "limit_bytes": int(arguments.limit * GIB), "placed": placed}
        if arguments.job:
            print(json.dumps(placed, indent=1))
            print(save("placement-forecast", results, note=f"{arguments.tokens} tokens a step, {arguments.steps} steps"))
            return
        moved = placed["read_bytes"] + placed["written_bytes"]
        print(f"peak resident {placed['peak_resident_bytes'] / GIB:.2f} GiB, on disk {placed['disk_peak_bytes'] / GIB:.2f} GiB")
        print(f"seconds a step {placed['step_seconds']}, {moved / GIB / arguments.steps:.1f} GiB moved a step")
        if arguments.check:
            results["plain"] = plain = run(arguments, folder, 0)
            results["equal"] = plain["losses_and_norms"] == placed["losses_and_norms"]
            print(f"without placement: {plain['step_seconds']} seconds, peak {plain['peak_resident_bytes'] / GIB:.2f} GiB")
            print(f"losses and gradient norms equal to the bit: {results['equal']}")
        print(save("placement-capacity", results, note=f"{arguments.tokens} tokens a step, {arguments.steps} steps"))


if __name__ == "__main__":
    main()
