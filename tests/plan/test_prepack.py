"""Frozen weights laid out once: planned where there is room, forecast as they are, and the same losses."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.kernels.int8 import FAST_INT8
from sartor.kernels.matmul import has_tiles
from sartor.kernels.prepack import prepacked
from sartor.machine import probe
from sartor.predict.verdict import TIGHT_SHARE
from sartor.train import read_metrics

make = importlib.import_module("sartor.plan.make").make
tiles = pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles, or there is no compiler")


@pytest.fixture
def adapters(job_tree: dict[str, Any]) -> dict[str, Any]:
    return {**job_tree, "method": "lora", "precision": "bf16-master", "strategy": {"micro_batch": 4}}


def plan(tree: dict[str, Any], **strategy: Any) -> sartor.Plan:
    return sartor.plan({**tree, "strategy": {**tree["strategy"], **strategy}})


@tiles
def test_it_is_planned_forecast_and_run_with_the_same_losses(adapters: dict[str, Any], tmp_path: Path) -> None:
    plans = {wanted: plan({**adapters, "output": str(tmp_path / str(wanted))}, prepack=wanted) for wanted in ("auto", False)}
    assert plans["auto"].strategy.prepack
    assert any("laid out once" in note for note in plans["auto"].notes)
    assert not plans[False].strategy.prepack
    weights = {wanted: one.forecast.peak.by_kind["weights"] for wanted, one in plans.items() if one.forecast.peak}
    assert weights["auto"] > 1.5 * weights[False]

    class Watch(sartor.Observer):
        def loaded(self, model: Any, *_: Any) -> None:
            self.packed = any(prepacked(module)[0] is not None for module in model.modules() if hasattr(module, "weight"))

    packed, losses = {}, {}
    for wanted, one in plans.items():
        watch = Watch()
        run = sartor.train(one, observers=[watch])
        packed[wanted] = watch.packed
        losses[wanted] = [line["loss"] for line in read_metrics(Path(run.folder)) if "loss" in line]
    assert packed == {"auto": True, False: False}
    assert losses["auto"] == losses[False]


@tiles
def test_it_is_left_where_memory_is_short(adapters: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((Path(adapters["model"]) / "config.json").read_text())
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({**config, "intermediate_size": 16384, "num_hidden_layers": 8}), encoding="utf-8")
    wide = {**adapters, "model": {"path": str(path), "tokenizer": adapters["model"]}}
    packed, plain = (plan(wide, prepack=wanted).forecast.process_bytes for wanted in ("auto", False))
    assert packed is not None
    assert plain is not None
    assert packed - plain > 2**25
    room = int((packed + plain) / 2 / TIGHT_SHARE)
    small = {**wide, "machine": {**wide["machine"], "host_memory": room}}
    left = plan(small)
    assert left.forecast.verdict == "fits"
    assert not left.strategy.prepack
    assert not left.strategy.recompute
    assert plan(small, prepack=True).strategy.prepack, "what is asked for is kept"


def test_jobs_that_cannot_have_it(adapters: dict[str, Any]) -> None:
    for changes, why in (
        ({"method": "full"}, "the method is full"),
        ({"precision": "float32"}, "the precision is float32"),
        ({"strategy": {"fused": False}}, r"strategy\.fused"),
        ({"strategy": {"frozen_products": "int8"}}, "exact"),
        ({"strategy": {"placement": "disk"}}, r"strategy\.placement"),
    ):
        if changes == {"strategy": {"frozen_products": "int8"}} and not set(FAST_INT8) & set(probe().instruction_sets):
            continue  # this processor can have neither
        tree = {**adapters, **changes}
        assert not plan(tree).strategy.prepack
        with pytest.raises(JobError, match=why if has_tiles() else r"strategy\.prepack"):
            plan(tree, prepack=True)


def test_other_processors_do_without(adapters: dict[str, Any]) -> None:
    machine = dataclasses.replace(probe(), instruction_sets=("avx2", "avx512_bf16"))
    assert not make(from_mapping(adapters), machine).strategy.prepack
