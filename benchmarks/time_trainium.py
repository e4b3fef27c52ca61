"""Llama-2 7B on 1, 2 and 4 instances of trn1.32xlarge: forecast against published sequences a second.

    python benchmarks/time_trainium.py

Published: sequence 4096, global batch 256, tensor parallel 8, data parallel over the rest (AWS Neuron, NeMo Megatron on
Trainium): 3.7, 7.4 and 14.6 sequences a second. Two forecasts: with what is published of the device alone, and with the speed of
its kernels taken from the one-instance row, which leaves the two others to be forecast.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from transformers import AutoConfig

from common import save
from sartor.job import from_mapping
from sartor.machine.catalogue import MachineModel, lookup
from sartor.model import ModelSource
from sartor.parallel import Layout
from sartor.predict.operations import Operations
from sartor.predict.rates import CatalogueRates
from sartor.predict.shapes import Shape, blank_batch
from sartor.predict.target import Target
from sartor.predict.time import TimeForecast, Work, forecast_time, network_of
from sartor.predict.whole import trace_job
from sartor.step import Precision

PUBLISHED = {1: 3.7, 2: 7.4, 4: 14.6}
LENGTH, GLOBAL_BATCH, TENSOR = 4096, 256, 8
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": LENGTH,
}


def layout_of(machine: MachineModel) -> Layout:
    return Layout(tensor=TENSOR, shard=machine.devices // TENSOR, zero=1)


def traced(machine: MachineModel) -> Operations:
    """A step's first and last micro-batch, one row each, activations recomputed."""
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    source = ModelSource(path="llama", config=AutoConfig.for_model("llama", **LLAMA), has_weights=False)
    batches = [blank_batch(Shape(1, LENGTH, LENGTH - 1), packing=False)] * 2
    return trace_job(
        job,
        source,
        batches,
        Target(kind="cpu"),
        precision=Precision.of("bf16-mixed"),
        recompute=True,
        attention=None,
        layout=layout_of(machine),
    ).operations


def forecast(machine: MachineModel, operations: Operations, speed: float) -> TimeForecast:
    layout = layout_of(machine)
    work = Work(micro_batches=GLOBAL_BATCH // layout.data, tokens=GLOBAL_BATCH * LENGTH, sequences=GLOBAL_BATCH, total_steps=1)
    rates = CatalogueRates(machine.device, speed=speed)
    network = network_of(machine.device, machine.devices_per_node, machine.network_bytes_per_second)
    return forecast_time({0: operations}, rates=rates, layout=layout, network=network, work=work)


def speed_from(machine: MachineModel, operations: Operations, sequences_per_second: float) -> float:
    """The speed of the kernels with which the forecast is what was published."""
    low, high = 0.05, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        if forecast(machine, operations, middle).sequences_per_second < sequences_per_second:
            low = middle
        else:
            high = middle
    return middle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true", help="write a result file")
    arguments = parser.parse_args()
    machines = {count: lookup(f"{count}xtrn1.32xlarge") for count in PUBLISHED}
    steps = {count: traced(machine) for count, machine in machines.items()}
    speed = speed_from(machines[1], steps[1], PUBLISHED[1])
    rows: list[dict[str, Any]] = []
    for count, machine in machines.items():
        start = time.perf_counter()
        known = forecast(machine, steps[count], speed)
        row: dict[str, Any] = {"instances": count, "published": PUBLISHED[count]}
        for name, made in (("from_specifications", forecast(machine, steps[count], 1.0)), ("speed_of_one_instance", known)):
            row[name] = round(made.sequences_per_second, 2)
            row[f"{name}_error"] = round(made.sequences_per_second / PUBLISHED[count] - 1, 4)
        row |= {
            "breakdown": {kind: round(seconds, 3) for kind, seconds in known.breakdown.items()},
            "forecast_seconds": round(time.perf_counter() - start, 4),
        }
        rows.append(row)
        print(row)
    print(f"speed of the kernels, from one instance: {speed:.3f} of what is known of other devices")
    if arguments.save:
        print(save("time-trainium", {"speed": round(speed, 4), "rows": rows}))


if __name__ == "__main__":
    main()
