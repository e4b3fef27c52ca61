"""Where a model comes from: its configuration, its tokenizer, and the class that transformers has for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.errors import ModelError
from sartor.job.schema import ModelJob

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSource:
    """A model before any weight is read. `config` is a transformers PretrainedConfig, which nobody changes."""

    path: str
    config: Any
    has_weights: bool
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model knows positions for, where its configuration says so."""
        text = self.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"):
            value = getattr(text, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)


def resolve(job: ModelJob) -> ModelSource:
    """The configuration of `job.path`: a hub id, a folder, or a config.json. Raises ModelError."""
    from transformers import AutoConfig

    path = Path(job.path)
    config_only = path.suffix == ".json"
    if config_only and not path.is_file():
        raise ModelError(f"no model configuration at {path}", remedy="check `model.path`")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json", why="a model folder needs one", remedy="check `model.path`")
    try:
        config = AutoConfig.from_pretrained(job.path, revision=job.revision, trust_remote_code=job.trust_remote_code)
        _take_flat_sizes(config, job)
    except Exception as error:
        raise explain(job.path, error) from error
    has_weights = not (config_only or job.random_weights)
    if has_weights and path.is_dir():
        _check_weight_files(path)
    return ModelSource(
        path=job.path, config=config, has_weights=has_weights, revision=job.revision, trust_remote_code=job.trust_remote_code
    )


def _take_flat_sizes(config: Any, job: ModelJob) -> None:
    """Some files of models that see have the sizes of their decoder at the top, where transformers leaves them unread and takes
    sizes of its own."""
    text = config.get_text_config()
    name = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    if name is None:
        return
    given, _ = type(config).get_config_dict(job.path, revision=job.revision)
    if name not in given and "num_hidden_layers" in given:
        sizes = {key: value for key, value in given.items() if key not in ("architectures", "model_type")}
        setattr(config, name, type(text).from_dict(sizes))


def weights_folder(source: ModelSource) -> Path | None:
    """The folder of a model's safetensors: its own, or the hub's cache, which is filled first. None where there is none."""
    folder = Path(source.path)
    if folder.is_dir():
        return folder
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    maybe: dict[str, Any] = {"revision": source.revision, **dict.fromkeys(options, False)}
    try:
        index = cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, **maybe)
        if index is not None:
            get_checkpoint_shard_files(source.path, index, revision=source.revision)
        file = index or cached_file(source.path, SAFE_WEIGHTS_NAME, **maybe)
    except Exception as error:
        raise explain(source.path, error) from error
    return None if file is None else Path(file).parent


def _check_weight_files(folder: Path) -> None:
    """Only safetensors are read: a pickle can run any code when it is opened."""
    if any(folder.glob("*.safetensors")):
        return
    if any((folder / name).exists() for name in PICKLED) or any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            f"{folder} holds pickled weights only (.bin, .pt)",
            why="opening a pickle can run code; Sartor reads safetensors",
            remedy="convert it where you trust it: AutoModel.from_pretrained(path).save_pretrained(new_path)",
        )
    raise ModelError(
        f"{folder} holds no weights (*.safetensors)",
        remedy="give a folder with weights, or train from random ones: model.random_weights=true",
    )


def load_tokenizer(job: ModelJob) -> Any:
    """The model's tokenizer, a fast one. Raises ModelError."""
    from transformers import AutoTokenizer

    path = Path(job.path)
    where = job.tokenizer or (str(path.parent) if path.suffix == ".json" else job.path)
    folder = Path(where)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(
            f"no tokenizer in {folder}",
            why="neither tokenizer.json nor tokenizer_config.json is there",
            remedy="give `model.tokenizer`",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=job.revision, trust_remote_code=job.trust_remote_code)
    except Exception as error:
        raise explain(where, error, what="tokenizer") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {where} has no fast version",
            why="the loss mask needs to know which characters a token covers",
            remedy="give `model.tokenizer`: a folder with a tokenizer.json",
        )
    return tokenizer


def explain(path: str, error: Exception, *, what: str = "model") -> ModelError:
    """The many ways in which loading fails, each in words that help."""
    text = f"{type(error).__name__}: {error}"
    reason = " ".join(str(error).split())[:400]
    if "trust_remote_code" in text:
        remedy = "read the code in its repository; if you trust it, model.trust_remote_code=true"
        return ModelError(f"the {what} {path} brings Python code of its own", why="Sartor does not run it unasked", remedy=remedy)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return ModelError(
            f"transformers does not know the architecture of {path}", why=reason, remedy="pip install -U transformers"
        )
    if not Path(path).exists() and isinstance(error, OSError | ValueError):
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else reason
        remedy = "check the spelling; for gated models `hf auth login`; for local models give the folder's path"
        return ModelError(f"no {what} {path!r}: there is no such folder, and the hub did not give it", why=why, remedy=remedy)
    return ModelError(f"cannot read the {what} at {path}", why=reason, remedy="check that the files are complete")
