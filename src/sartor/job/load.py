"""Read a job: defaults < YAML < command line, strict, with the line and the remedy in every message."""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sartor.errors import JobError
from sartor.job.hints import suggest
from sartor.job.schema import Bytes, Job, QuantiseJob
from sartor.job.units import parse_bytes

_LIMITS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise JobError(
                f"{loader.name}:{key_node.start_mark.line + 1}: `{key}` is given twice", remedy="remove one of the two"
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load(path: str | Path | None, overrides: Iterable[str] = (), *, inference: bool = False) -> Job:
    """The job in `path` (None: nothing but overrides) with `a.b=c` overrides applied; `inference`: it needs no data.

    Raises JobError, which says what to change.
    """
    text, source = ("{}", "command line") if path is None else (_text(Path(path)), str(path))
    tree = _parse(text, source)
    places = {key: f"{source}:{line}" for key, line in _key_lines(text).items()}
    for override in overrides:
        _apply(tree, override)
        places[override.partition("=")[0]] = "command line"
    if inference:
        tree.setdefault("inference", {})
    return from_mapping(tree, source=source, places=places)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"no job file at {path}", remedy="check the path; `sartor demo` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8 text", why=str(error), remedy="save the file as UTF-8") from None
    except OSError as error:
        raise JobError(f"cannot read {path}", why=str(error)) from None


def from_mapping(tree: Mapping[str, Any], *, source: str = "job", places: Mapping[str, str] | None = None) -> Job:
    """A job from nested mappings, checked like a file. `places`: where each dotted key stands. Raises JobError."""
    job: Job = _Builder(source, places or {}).build(Job, tree, "")
    if job.peft is not None and job.method != "peft":
        if "method" in tree:
            raise JobError(f"{source}: `peft` is given, but `method` is {job.method}", remedy="remove one of the two keys")
        job = dataclasses.replace(job, method="peft")
    if job.method == "peft" and job.peft is None:
        raise JobError(f"{source}: method peft needs a `peft` section", remedy="e.g. `peft: {peft_type: IA3}`")
    job = _with_quantisation(job, source)
    if "data" not in tree and "inference" in tree:
        return job
    if bool(job.data.path) == (job.data.synthetic is not None):
        missing = "`data.path` is missing" if "data" in tree else "`data` is missing"
        what = "both `data.path` and `data.synthetic` are given" if job.data.path else missing
        raise JobError(
            f"{source}: {what}", remedy="give a file of examples, or `data: {synthetic: {length: 1024}}` to plan without"
        )
    return job


def _with_quantisation(job: Job, source: str) -> Job:
    """`quantise` filled in where the method says it. Raises JobError where the two do not go together."""
    if job.quantise is None:
        return dataclasses.replace(job, quantise=QuantiseJob()) if job.method == "qlora" else job
    if job.method == "full":
        raise JobError(
            f"{source}: `quantise` is given, but method full trains the weights themselves",
            why="4- and 8-bit weights have no gradient",
            remedy="method=qlora, or another method with an adapter; or leave `quantise` out",
        )
    if job.method == "qlora" and job.quantise.mode != "nf4":
        raise JobError(
            f"{source}: method qlora is LoRA beside nf4 weights, `quantise.mode` is {job.quantise.mode}", remedy="method=lora"
        )
    return job


def to_mapping(job: Job) -> dict[str, Any]:
    """The job as plain nested mappings: what `job.yaml` of a run holds. `from_mapping` reads it back equal."""
    tree = dataclasses.asdict(job)
    if not has_data(job):
        del tree["data"]
    return {key: value for key, value in tree.items() if value is not None or key not in ("peft", "quantise")}


def has_data(job: Job) -> bool:
    """Whether the job says what to train on; one that only plans inference need not."""
    return bool(job.data.path) or job.data.synthetic is not None


def to_yaml(job: Job) -> str:
    """The resolved job as YAML."""
    return yaml.safe_dump(to_mapping(job), sort_keys=False, allow_unicode=True)


def _parse(text: str, source: str) -> dict[str, Any]:
    loader = _Loader(text)
    loader.name = source
    try:
        tree = loader.get_single_data()
    except yaml.YAMLError as error:
        raise JobError(f"{source} is not valid YAML", why=" ".join(str(error).split())) from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise JobError(
            f"{source} holds no job", why="the file should be `key: value` lines", remedy="give at least `model:` and `data:`"
        )
    return tree


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key → line number, for messages."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                dotted = f"{prefix}{key.value}"
                lines[dotted] = key.start_mark.line + 1
                walk(value, f"{dotted}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines


def _apply(tree: dict[str, Any], override: str) -> None:
    """`a.b=c`: the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"override {override!r} is not of the form key=value", remedy="e.g. training.epochs=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"the value in {override!r} is not valid YAML", why=" ".join(str(error).split())) from None
    *parents, last = key.split(".")
    here = tree
    fields: Any = Job
    for name in parents:
        fields = _section_type(fields, name)
        below = here.get(name)
        if below is None:
            below = {}
        elif not isinstance(below, dict):  # `model: NAME` in the file, `model.revision=…` on the command line
            below = {getattr(fields, "SHORTHAND", name): below} if below != "auto" else {}
        here[name] = below
        here = below
    here[last] = value


def _section_type(owner: Any, name: str) -> Any:
    hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
    return section_of(hints.get(name))


class _Builder:
    """Checks plain mappings against the schema's types and limits."""

    def __init__(self, source: str, places: Mapping[str, str]) -> None:
        self.source, self.places = source, places

    def error(self, key: str, what: str, *, why: str = "", remedy: str = "") -> JobError:
        return JobError(f"{self.places.get(key, self.source)}: {what}", why=why, remedy=remedy)

    def build(self, cls: Any, tree: Any, prefix: str) -> Any:
        tree = self._mapping(cls, tree, prefix)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for key in tree:
            if key not in fields:
                dotted = f"{prefix}{key}"
                raise self.error(dotted, f"unknown key `{dotted}`", remedy=suggest(str(key), prefix))
        values = {}
        for name, field in fields.items():
            dotted = f"{prefix}{name}"
            if name in tree:
                values[name] = self._convert(hints[name], tree[name], dotted)
                self._check_limits(field.metadata["limits"], values[name], dotted)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self.error(prefix.rstrip("."), f"`{dotted}` is missing", remedy=f"give {field.metadata['meaning']}")
        return cls(**values)

    def _mapping(self, cls: Any, tree: Any, prefix: str) -> Mapping[str, Any]:
        key = prefix.rstrip(".")
        if isinstance(tree, Mapping):
            return tree
        if tree is None:
            return {}
        shorthand = getattr(cls, "SHORTHAND", None)
        if shorthand and isinstance(tree, str):
            return {shorthand: tree}
        if tree == "auto":
            return {}
        raise self.error(key, f"`{key}` should be a section of keys, not {tree!r}", remedy="see docs/job.md for its keys")

    def _convert(self, hint: Any, value: Any, key: str) -> Any:
        section = section_of(hint)
        if section is not None and not (value is None and section is not hint):
            return self.build(section, value, f"{key}.")
        try:
            return convert(hint, value)
        except ValueError:
            raise self.error(key, f"`{key}` is {value!r}", remedy=f"give {describe(hint)}") from None

    def _check_limits(self, limits: Mapping[str, float], value: Any, key: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        for name, limit in limits.items():
            if not _LIMITS[name](value, limit):
                raise self.error(key, f"`{key}` is {value}", remedy=f"give a value {name.replace('_', ' ')} {limit}")


def section_of(hint: Any) -> Any:
    """The dataclass that a hint is, or may be."""
    options = [hint, *typing.get_args(hint)]
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; lenient where people are (`2e-5` is text in YAML 1.1). Raises ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value)
    if origin is typing.Literal:
        if value in arguments and isinstance(value, str):
            return value
    elif origin is list:
        if isinstance(value, list | tuple):
            return [convert(arguments[0], item) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {convert(str, key): convert(arguments[1], item) for key, item in value.items()}
    elif hint is Any:
        return value
    else:
        return _convert_scalar(hint, value)
    raise ValueError(value)


def _convert_union(arguments: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in arguments:
        return None
    for argument in arguments:
        if argument is not type(None):
            try:
                return convert(argument, value)
            except ValueError:
                continue
    raise ValueError(value)


def _convert_scalar(hint: Any, value: Any) -> Any:
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is Bytes:
        return parse_bytes(value)
    elif hint is float and isinstance(value, int | float | str):
        number = float(value)
        if number == number and abs(number) != float("inf"):
            return number
    elif hint is int and isinstance(value, int | float | str):
        number = float(value.replace("_", "") if isinstance(value, str) else value)
        if number.is_integer():
            return int(number)
    elif hint is str and isinstance(value, str | int | float):
        return str(value)
    raise ValueError(value)


def describe(hint: Any) -> str:
    """What a key takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(arguments) if len(arguments) > 1 else str(arguments[0])
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return "a section of keys"
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing (null)"}
    return "a size such as 6GiB" if hint is Bytes else names.get(hint, str(hint))
