"""Who takes part: Sartor and its peers, each as its documentation recommends for a CPU, and variants of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One way to fine-tune. Without a script it is Sartor's command line with `overrides`."""

    package: str
    """What must be importable; the name of --peer-python."""
    script: str | None = None
    overrides: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    """Options that method lora has besides."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment it runs in."""
    float32: bool = False
    """Computes in float32, so that losses agree but for the order of sums."""

    def options_of(self, method: str) -> dict[str, Any]:
        return self.options | (self.lora if method == "lora" else {})


_FUSED: dict[str, Any] = {"fused": True, "workers": 1}
_BF16 = {**_FUSED, "bf16": True}
_TUNED = {**_BF16, "group": True}
# Where the processor does not multiply bfloat16 fast, bf16 makes a step slower.
_TUNED_NO_BF16 = {**_FUSED, "group": True}
# Frozen weights stored in bfloat16 are read without a cast at every use.
_FROZEN = {"weights": "bfloat16"}
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**26)}
_COMPILED = {**_TUNED, "compile": True}


ENTRANTS = {
    "sartor": Entrant(package="sartor"),
    "sartor-float32": Entrant(package="sartor", overrides=("precision=float32",), float32=True),
    # Two processes, each bound to its part of the machine, against one that uses all of it.
    "sartor-2-processes": Entrant(package="sartor", overrides=("strategy.processes=2",)),
    # What changes the result and has to be asked for: products with frozen weights in int8; and what changes its rounding: the
    # beginnings that examples have in common computed once.
    "sartor-int8": Entrant(package="sartor", overrides=("strategy.frozen_products=int8",)),
    "sartor-shared-prefixes": Entrant(package="sartor", overrides=("strategy.share_prefixes=true",)),
    # (a) Hugging Face's Trainer, PEFT for LoRA: nothing set but the batch
    "hf": Entrant(package="transformers", script="hf_trainer.py", float32=True),
    # (b) the same tuned: bf16 autocast, fused AdamW, batches of like length, a worker;
    # frozen weights of LoRA stored in bfloat16, or in float32
    "hf-tuned": Entrant(package="transformers", script="hf_trainer.py", options=_TUNED, lora=_FROZEN),
    "hf-tuned-float32": Entrant(package="transformers", script="hf_trainer.py", options=_TUNED),
    "hf-tuned-compile": Entrant(package="transformers", script="hf_trainer.py", options=_COMPILED, lora=_FROZEN),
    # Not in its documentation: glibc told to keep large blocks instead of giving their pages back and faulting them in again.
    "hf-tuned-malloc": Entrant(
        package="transformers", script="hf_trainer.py", options=_TUNED, lora=_FROZEN, variables=_KEEP_MEMORY
    ),
    # All in bfloat16, master weights and moments too: fast, but small updates are rounded away.
    "hf-bf16": Entrant(package="transformers", script="hf_trainer.py", options={**_TUNED_NO_BF16, **_FROZEN}),
    "trl": Entrant(package="trl", script="trl_sft.py", options=_TUNED, lora=_FROZEN),
    "trl-packed": Entrant(package="trl", script="trl_sft.py", options={**_BF16, "packing": True}, lora=_FROZEN),
    "trl-padding-free": Entrant(package="trl", script="trl_sft.py", options={**_BF16, "padding_free": True}, lora=_FROZEN),
    # (c) tools with loops of their own
    "llamafactory": Entrant(package="llamafactory", script="llamafactory_sft.py", options=_TUNED),
    "litgpt": Entrant(package="litgpt", script="litgpt_finetune.py", options={"precision": "bf16-mixed"}),
    "litgpt-bf16": Entrant(package="litgpt", script="litgpt_finetune.py", options={"precision": "bf16-true"}),
    # (d) tuned for a processor that does not multiply bfloat16 fast: all of the above but bf16
    "hf-tuned-no-bf16": Entrant(package="transformers", script="hf_trainer.py", options=_TUNED_NO_BF16, float32=True),
    "trl-no-bf16": Entrant(package="trl", script="trl_sft.py", options=_TUNED_NO_BF16, float32=True),
    "trl-padding-free-no-bf16": Entrant(
        package="trl", script="trl_sft.py", options={**_FUSED, "padding_free": True}, float32=True
    ),
    "llamafactory-no-bf16": Entrant(package="llamafactory", script="llamafactory_sft.py", options=_TUNED_NO_BF16, float32=True),
    "litgpt-no-bf16": Entrant(package="litgpt", script="litgpt_finetune.py", options={"precision": "32-true"}, float32=True),
}

_STANDARD = ("hf-tuned", "trl", "litgpt"), ("hf-tuned-no-bf16", "trl-padding-free-no-bf16", "llamafactory-no-bf16")


def standard() -> tuple[str, ...]:
    """Those of the full benchmark on this machine: of a peer's variants the fastest."""
    from sartor.machine import probe
    from sartor.step.precision import FAST_BF16

    fast = any(name in FAST_BF16 for name in probe().instruction_sets)
    return ("sartor", "hf", *_STANDARD[0 if fast else 1])


def versions(python: str) -> dict[str, str]:
    """What a peer's Python has installed of what matters."""
    script = (
        "import json, importlib.metadata as m\nfound = {}\n"
        "for n in ('torch', 'transformers', 'peft', 'accelerate', 'trl', 'litgpt', 'lightning', 'llamafactory'):\n"
        "    try: found[n] = m.version(n)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout)
    return found
