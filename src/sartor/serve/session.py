"""A trained run, or any model, loaded to be talked to: the template of training, one BOS, stop at the end of the turn."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sartor.data.prompts import encode_prompt
from sartor.data.template import end_marker
from sartor.errors import ModelError, UsageError
from sartor.job import Job, from_mapping
from sartor.job.schema import MachineJob, ModelJob, QuantiseJob
from sartor.machine import probe
from sartor.model import build, check_trainable, load_tokenizer, resolve
from sartor.model.build import quiet

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 always takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model with its tokenizer. `chat`: whether prompts go through the chat template."""

    model: Any
    tokenizer: Any
    chat: bool

    @classmethod
    def open(cls, where: str, *, device: str = "auto") -> Session:
        """A run's folder, a checkpoint in it, a model folder or a hub id. Raises UsageError or ModelError."""
        target = probe(MachineJob(device=device)).device.torch_name
        folder = Path(where)
        job_file = next((path / "job.yaml" for path in (folder, folder.parent) if (path / "job.yaml").is_file()), None)
        if job_file is None:
            job = ModelJob(path=where)
            tokenizer = load_tokenizer(job)
            return cls(model=_plain_model(job, target), tokenizer=tokenizer, chat=bool(tokenizer.chat_template))
        files = _model_files(folder)
        trained = from_mapping(yaml.safe_load(job_file.read_text(encoding="utf-8")), source=str(job_file))
        if (files / "adapter_config.json").is_file():
            model = _adapted(trained, files, target)
        else:
            model = _plain_model(dataclasses.replace(trained.model, path=str(files)), target)
        tokenizer = load_tokenizer(ModelJob(path=str(files)))
        return cls(model=model, tokenizer=tokenizer, chat=_trained_on_chats(job_file.parent, tokenizer))

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a conversation (ending with the user), or of bare text where the model knows no chat."""
        if not self.chat:
            if not isinstance(prompt, str):
                raise UsageError(
                    "this run was trained on plain text, not on conversations", remedy="`sartor generate` continues text"
                )
            return encode_prompt(self.tokenizer, prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return encode_prompt(self.tokenizer, messages)

    def answer(self, prompt: str | Sequence[Message], sampling: Sampling | None = None) -> str:
        """The whole answer at once."""
        return "".join(self.stream(prompt, sampling))

    def stream(self, prompt: str | Sequence[Message], sampling: Sampling | None = None) -> Iterator[str]:
        """The answer piece by piece, as it is made."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []
        ids = self.encode(prompt)

        def work() -> None:
            try:
                generate(self.model, self.tokenizer, [ids], sampling or Sampling(), streamer=streamer)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        yield from streamer
        worker.join()
        if failures:
            raise failures[0]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, *, streamer: Any = None
) -> list[list[int]]:
    """New token ids for every prompt, without what ends them. Prompts are padded on the left, in one batch."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ends, stop_strings = ends_of_turn(model, tokenizer)
    if stop_strings:
        options |= {"stop_strings": stop_strings, "tokenizer": tokenizer}
    model.eval()
    with quiet():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad,
            streamer=streamer,
            **options,
        )
    return [_until(row[width:].tolist(), ends) for row in output]


def ends_of_turn(model: Any, tokenizer: Any) -> tuple[list[int], list[str]]:
    """Token ids that end an answer, and strings that do where the template's end marker is no single token."""
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
    marker = end_marker(tokenizer) if tokenizer.chat_template else ""
    if not marker:
        return sorted(ids), []
    tokens = tokenizer(marker, add_special_tokens=False).input_ids
    if len(tokens) == 1:
        return sorted({*ids, tokens[0]}), []
    return sorted(ids), [marker]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _model_files(folder: Path) -> Path:
    """Where a run's weights are: in its folder once it has finished, before that in its latest checkpoint."""
    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return folder
    latest = folder / "LATEST"
    if latest.is_file() and (folder / latest.read_text(encoding="utf-8").strip()).is_dir():
        return folder / latest.read_text(encoding="utf-8").strip()
    raise ModelError(f"{folder} holds no trained model yet", remedy="train it: `sartor train`, or wait for the first checkpoint")


def _plain_model(job: ModelJob, device: str, quantise: QuantiseJob | None = None) -> nn.Module:
    source = resolve(job)
    check_trainable(source)
    dtype = source.config.dtype or torch.float32
    return build(source, dtype=dtype, device=device, quantise=quantise).eval()


def _adapted(job: Job, files: Path, device: str) -> nn.Module:
    import peft

    model = _plain_model(job.model, device, job.quantise)
    try:
        with quiet():
            return peft.PeftModel.from_pretrained(model, str(files)).eval()  # type: ignore[no-any-return]
    except Exception as error:
        raise ModelError(f"cannot load the adapter in {files}", why=" ".join(str(error).split())[:300]) from error


def _trained_on_chats(run: Path, tokenizer: Any) -> bool:
    """Whether the run's data was conversations: its plan knows."""
    try:
        plan = yaml.safe_load((run / "plan.yaml").read_text(encoding="utf-8"))
        return bool(plan["data"]["format"] != "text")
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return bool(tokenizer.chat_template)
