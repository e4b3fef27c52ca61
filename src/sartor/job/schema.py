"""The job: what a user asks for. Frozen dataclasses, one a section; `option` says what a key means and what it may be.

The loader (`load.py`) builds these from YAML and overrides; `docs/job.md` is printed from them, so neither can drift.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NewType

Bytes = NewType("Bytes", int)
"""An int that the loader reads from `6GiB`."""

Method = Literal["full", "lora", "qlora", "prefix", "prompt", "peft"]
Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"]


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """A documented field. `limits`: `at_least`, `at_most`, `above`, `below`; checked by the loader."""
    metadata = {"meaning": meaning, "limits": limits}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(meaning: str) -> Any:
    """A documented field without a default."""
    return field(metadata={"meaning": meaning, "limits": {}})


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """Which model. `model: NAME` is short for `model: {path: NAME}`."""

    SHORTHAND: ClassVar[str] = "path"
    path: str = required("hub id, local folder, or a `config.json` alone (plan only, or train from random weights)")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: str | None = option(None, "hub id or folder of the tokenizer, where it is not with the model")
    random_weights: bool = option(False, "start from random weights (the default where there is a config.json only)")
    trust_remote_code: bool = option(False, "run Python code that comes with the model; read it first")


@dataclass(frozen=True, kw_only=True)
class SyntheticJob:
    """Random tokens of a given length, to plan without data."""

    length: int = option(1024, "tokens of every example", at_least=2)
    examples: int = option(1024, "number of examples", at_least=1)
    trained: float = option(1.0, "share of each example, at its end, that counts in the loss", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class DataJob:
    """Which data, and how it becomes tokens. `data: FILE` is short for `data: {path: FILE}`."""

    SHORTHAND: ClassVar[str] = "path"
    path: str = option("", "a file (.json .jsonl .csv .tsv .parquet .txt), a folder of them, or a hub data set id")
    synthetic: SyntheticJob | None = option(None, "random tokens instead of a file, e.g. `{length: 768}`")
    format: Format = option("auto", "how records are read; `auto` recognises it from the first records and says so")
    columns: dict[str, str] = option(dict, "other names for the format's columns, e.g. `{prompt: content, completion: summary}`")
    subset: str | None = option(None, "configuration of a hub data set")
    split: str = option("train", "split of a hub data set, or of a folder that has splits")
    documents: Literal["file", "lines"] = option("file", "a .txt file is one document, or one a line")
    limit: int | None = option(None, "use the first so many records only", at_least=1)
    template: str = option(
        "auto", "chat template: `auto` (the tokenizer's), a name (chatml, llama3, alpaca, plain …) or a .jinja file"
    )
    system: str | None = option(None, "system message for conversations that bring none")
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", "which words count in the loss: every assistant turn, the last one only, or everything"
    )
    max_length: int | None = option(None, "longest sequence in tokens; default: the model's limit, at most 2048", at_least=2)
    overlong: Literal["truncate", "drop"] = option("truncate", "what becomes of longer examples; counted and shown")
    packing: Literal["auto"] | bool = option(
        "auto",
        "put several examples in a row, each seeing only itself; `auto`: where the model can and it is faster",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What is held out, and how the result is judged."""

    path: str | None = option(None, "a file of held-out data, read like `data`")
    fraction: float = option(0.0, "share of the data held out, where there is no `path`", at_least=0.0, below=1.0)
    every: int | None = option(None, "evaluate every so many steps; always before the first and after the last", at_least=1)
    examples: int | None = option(None, "use at most so many held-out examples for the loss", at_least=1)
    generate: int = option(3, "answer so many held-out prompts before and after, for the report", at_least=0)
    max_new_tokens: int = option(64, "length limit of those answers", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoraJob:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by PEFT; of methods lora and qlora."""

    rank: int = option(16, "rank of the update", at_least=1)
    alpha: float = option(32.0, "scale; the update is multiplied by alpha / rank", above=0)
    dropout: float = option(0.0, "dropout on the adapter's input", at_least=0.0, below=1.0)
    targets: str | list[str] = option("all-linear", "module names, a regular expression, or `all-linear`")


@dataclass(frozen=True, kw_only=True)
class QuantiseJob:
    """Frozen weights in 4 or 8 bits, by bitsandbytes. `quantise: MODE` is short for `quantise: {mode: MODE}`.

    For LoRA, prefix and prompt; method qlora (Dettmers et al. 2023, arXiv 2305.14314) is lora with `quantise: nf4`. All linear
    layers but the head (and what is tied to it) are quantised, as transformers does it. A plan needs nothing more; training
    needs `pip install 'sartor[quant]'`.
    """

    SHORTHAND: ClassVar[str] = "mode"
    mode: Literal["nf4", "int8"] = option("nf4", "nf4 (4 bits, QLoRA), int8 (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)")
    double: bool = option(True, "nf4: quantise the scales of the blocks as well")
    compute: Dtype = option("bfloat16", "nf4: the format in which quantised layers compute. float16 is for planning only")
    upcast: bool = option(
        False, "what is not quantised (embeddings, norms, head) in float32, as PEFT's `prepare_model_for_kbit_training` does"
    )


@dataclass(frozen=True, kw_only=True)
class PrefixJob:
    """P-tuning v2 (Liu et al. 2021, arXiv 2110.07602): trained keys and values before every layer's own, by PEFT."""

    length: int = option(32, "prefix length in tokens", at_least=1)
    projection: bool = option(False, "train the prefix through a two-layer projection")
    projection_size: int | None = option(None, "hidden size of that projection; default: the model's", at_least=1)


@dataclass(frozen=True, kw_only=True)
class PromptJob:
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings before the input, by PEFT."""

    length: int = option(20, "number of virtual tokens", at_least=1)
    text: str | None = option(None, "start from the embeddings of this text instead of random ones")


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """How long, how fast, how regularised. Batch sizes count examples, packed or not."""

    epochs: float = option(3.0, "passes over the data", above=0)
    max_steps: int | None = option(None, "stop after so many optimizer steps, whatever `epochs` says", at_least=1)
    global_batch: int = option(16, "examples per optimizer step; micro-batches and packing do not change it", at_least=1)
    learning_rate: float | None = option(
        None, "peak rate; default by method: full 5e-5, lora and qlora 2e-4, prefix and prompt 1e-2", above=0
    )
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "shape of the rate after warm-up")
    warmup: float = option(0.03, "warm-up: a share of all steps below 1, a number of steps from 1 on", at_least=0)
    final_rate: float = option(0.0, "rate at the end of the schedule, as a share of the peak", at_least=0, at_most=1)
    weight_decay: float = option(0.0, "decoupled weight decay on matrices (not on norms and biases)", at_least=0)
    betas: list[float] = option(lambda: [0.9, 0.999], "Adam's decay rates of the first and second moment")
    epsilon: float = option(1e-8, "Adam's epsilon", above=0)
    optimizer: Literal["adamw", "adamw-foreach", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "sgd"] = option(
        "adamw",
        "adamw (fused), adamw-foreach (PyTorch's default on accelerators, takes temporaries of all it trains), sgd; for one "
        "device: adamw-8bit (moments in 8 bits, so not exact), paged-adamw and paged-adamw-8bit (CUDA: moments move to the host "
        "when room is short). On CUDA they are bitsandbytes' (a plan needs nothing more, training `pip install 'sartor[quant]'`)",
    )
    loss: Literal["sartor", "hf"] = option(
        "sartor", "sartor (logits where the mask is set only), hf (transformers' own, all of them)"
    )
    clip_norm: float = option(1.0, "clip gradients to this global norm; 0 turns clipping off", at_least=0)
    seed: int = option(0, "of data order, initialisation and dropout", at_least=0)
    save_every: int | None = option(None, "checkpoint every so many steps; always at the end", at_least=1)
    keep_last: int = option(2, "how many of the latest checkpoints to keep", at_least=1)
    keep_best: bool = option(False, "keep the checkpoint with the lowest held-out loss as well, and end with it")
    tensorboard: bool = option(True, "write TensorBoard events beside metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class PrecisionJob:
    """`precision: MODE` is short for `precision: {mode: MODE}`; the other keys say otherwise than the mode does."""

    SHORTHAND: ClassVar[str] = "mode"
    mode: Literal["auto", "float32", "bf16-mixed", "bf16", "bf16-master"] = option(
        "auto",
        "float32; bf16-mixed (what trains in float32, the rest and the arithmetic in bfloat16); bf16 (all in bfloat16); "
        "bf16-master (CPU, adamw or adamw-8bit: all in bfloat16, and beside what trains the bits that are missing to float32); "
        "auto: bf16-mixed on accelerators; on a CPU bf16-master where it multiplies bfloat16 fast (avx512_bf16, amx_bf16), "
        "else float32",
    )
    weights: Dtype | None = option(None, "format of frozen weights (and, with method full, of all that is loaded)")
    trained: Dtype | None = option(None, "format of what trains, and so of its gradients and moments")
    compute: Dtype | Literal["as-stored"] | None = option(
        None, "autocast to this format; `as-stored` computes in the format of the weights. float16 is for planning only"
    )
    rounding: Literal["nearest", "stochastic"] = option(
        "nearest",
        "of updated bfloat16 weights that keep no residual: to the nearest, where small updates are lost, or stochastic (CPU, "
        "one process, adamw or adamw-8bit, mode bf16): up or down by chance, right on average, the same for the same "
        "`training.seed`",
    )


@dataclass(frozen=True, kw_only=True)
class MachineJob:
    """Where to run. `machine: NAME` is short for `machine: {name: NAME}`."""

    SHORTHAND: ClassVar[str] = "name"
    name: str = option("auto", "`auto`: this machine as it is; or a name of docs/machines.md, such as L40S-48GB, to plan for it")
    device: str = option("auto", "auto, cpu, or an accelerator such as cuda or cuda:1")
    device_memory: Bytes | None = option(None, "use at most so much memory on the device, e.g. 6GiB", at_least=1)
    host_memory: Bytes | None = option(None, "use at most so much main memory, e.g. 16GiB", at_least=1)
    threads: int | None = option(None, "CPU threads; default: all cores this process may use", at_least=1)


@dataclass(frozen=True, kw_only=True)
class StrategyJob:
    """How to run it. Everything left at `auto` is planned; whatever is given is kept. `strategy: auto` leaves all open."""

    micro_batch: Literal["auto"] | int = option("auto", "rows computed at once; the rest of a step is accumulated", at_least=1)
    recompute: Literal["auto", "none", "full"] | int = option(
        "auto",
        "drop activations in forward and compute them again in backward: none, full, or the number of blocks that do, the first "
        "ones; `auto`: as few as let the job fit",
        at_least=1,
    )
    placement: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        "where weights, gradients and optimizer state live while nothing computes with them: device (what computes), host (main "
        "memory below an accelerator), disk (a file in TMPDIR, or in the run's folder where that is in memory); `auto`: as "
        "little elsewhere as lets the job fit. On a CPU the result is the same to the bit",
    )
    attention: Literal["auto", "segments", "sdpa", "eager", "flash_attention_2"] = option(
        "auto",
        "attention kernel, by transformers' name; segments (ours, for CPUs: every example of a row by itself). `auto`: on a CPU "
        "segments where the model can, else sdpa",
    )
    fused: bool = option(
        True,
        "on a CPU with a C++ compiler: norms, rotary positions and gates of models whose code is known run in compiled loops, "
        "one pass over memory each",
    )
    frozen_products: Literal["exact", "int8"] = option(
        "exact",
        "on a CPU, method lora: products with frozen weights in the format of `precision` (exact), or in int8, which is "
        "faster and changes the result a little (docs/cpu.md)",
    )
    prepack: Literal["auto"] | bool = option(
        "auto",
        "on a CPU that multiplies tiles (AMX), where weights are frozen in bfloat16: lay them out for its products once, not in "
        "every product, which takes twice their memory more; the same result to the bit. `auto`: where that is at most a quarter "
        "of memory, and the job fits with it",
    )
    share_prefixes: bool = option(
        False,
        "on a CPU, with packing: what the examples of a row begin with (a template's head, a system prompt) is computed once; "
        "the same result but for rounding (docs/cpu.md)",
    )
    processes: Literal["auto"] | int = option(
        "auto",
        "on a CPU: processes that share the examples of a step, each bound to its cores and their memory; `auto`: one a NUMA "
        "cluster, one where there is no NUMA",
        at_least=1,
    )
    expandable_segments: Literal["auto"] | bool = option(
        "auto",
        "let the segments of PyTorch's CUDA allocator grow, so that varying lengths do not fragment it; `auto`: yes, unless "
        "PYTORCH_ALLOC_CONF says otherwise",
    )
    zero: Literal["auto"] | int = option(
        "auto",
        "what the devices of `shard` (and `context`) share: 1 optimizer state, 2 gradients as well, 3 weights as well (FSDP2)",
        at_least=1,
        at_most=3,
    )
    shard: Literal["auto"] | int = option(
        "auto", "devices that share a copy; default: all that the other sizes leave", at_least=1
    )
    replicate: Literal["auto"] | int = option(
        "auto", "copies of that, gradients averaged among them; `auto`: one, or one a node", at_least=1
    )
    context: int = option(
        1, "context parallel ranks: devices that share the tokens of a row (ring attention), and what `shard` shares", at_least=1
    )
    tensor: Literal["auto"] | int = option(
        "auto", "tensor parallel ranks: devices that compute every layer together; `auto`: at most those of a node", at_least=1
    )
    sequence: Literal["auto"] | bool = option(
        "auto",
        "sequence parallelism: between the layers' products, tensor parallel ranks share the tokens; `auto`: where `tensor` is "
        "chosen by the plan",
    )
    pipeline: int = option(1, "pipeline stages: devices that hold different layers", at_least=1)
    schedule: Literal["1f1b", "gpipe"] = option("1f1b", "order of the pipeline's micro-batches")


@dataclass(frozen=True, kw_only=True)
class InferenceJob:
    """Generation, for `sartor plan --inference`: how much memory answers take. Training ignores it."""

    batch: int = option(1, "prompts answered at once", at_least=1)
    prompt: int = option(1024, "tokens of the longest prompt", at_least=1)
    answer: int = option(256, "tokens of an answer at most", at_least=1)
    cache: Literal["dynamic", "static"] = option(
        "dynamic",
        "of keys and values: dynamic (grows with every token, transformers' default), static (full size from the start)",
    )
    padded: Literal["auto"] | bool = option(
        "auto", "prompts differ in length, and an attention mask goes along; `auto`: where there are several"
    )
    sampling: bool = option(False, "draw tokens (temperature and top-p) instead of taking the likeliest")
    dtype: Literal["auto"] | Dtype = option(
        "auto", "format of the weights; `auto`: the one in the model's configuration, else bfloat16 (on a CPU float32)"
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """The whole job. Made by `sartor.job.load`."""

    model: ModelJob = required("which model")
    data: DataJob = option(DataJob, "which data; needed by all but plans of inference")
    method: Method = option(
        "lora",
        "which parameters train: full, lora, qlora (lora beside 4-bit weights), prefix (P-tuning v2), prompt, or any `peft` "
        "configuration",
    )
    lora: LoraJob = option(LoraJob, "options of methods lora and qlora")
    quantise: QuantiseJob | None = option(None, "frozen weights in 4 or 8 bits; method qlora sets it")
    prefix: PrefixJob = option(PrefixJob, "options of method prefix")
    prompt: PromptJob = option(PromptJob, "options of method prompt")
    peft: dict[str, Any] | str | None = option(None, "any PEFT configuration, or the path of an adapter_config.json")
    training: TrainingJob = option(TrainingJob, "how to train")
    evaluation: EvaluationJob = option(EvaluationJob, "how to judge")
    precision: PrecisionJob = option(PrecisionJob, "number formats")
    machine: MachineJob = option(MachineJob, "where to run")
    strategy: StrategyJob = option(StrategyJob, "how to run")
    inference: InferenceJob = option(InferenceJob, "what `sartor plan --inference` plans for")
    output: str = option("runs/first", "folder for everything the run writes")
