"""The Python face of Sartor: the same steps as the command line, as functions.

import sartor

plan = sartor.plan("job.yaml", ["training.epochs=1"])   # data; no weights are read
run = sartor.train(plan)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor import job as jobs
from sartor.data import DataSets, prepare
from sartor.errors import JobError
from sartor.job import Job
from sartor.launch.local import run as launch
from sartor.methods import traits
from sartor.model import load_tokenizer, resolve
from sartor.plan import Plan, make, max_length
from sartor.plan.compare import Comparison
from sartor.plan.compare import compare as make_comparison
from sartor.plan.inference import InferencePlan, make_inference
from sartor.predict.memory import collector_paused
from sartor.report import write_report
from sartor.serve import Judge
from sartor.train import Observer, Run, read_metrics

JobLike = Job | str | Path | Mapping[str, Any]


def load_job(job: JobLike, overrides: Iterable[str] = ()) -> Job:
    """A job from a file, nested mappings, or one that is loaded already. Raises JobError."""
    if isinstance(job, Job):
        return job
    if isinstance(job, Mapping):
        return jobs.from_mapping(job)
    return jobs.load(job, overrides)


def plan(job: JobLike, overrides: Iterable[str] = ()) -> Plan:
    """Plan a job for this machine: strategy, memory forecast, data summary. Needs no weights and no accelerator.

    Raises UsageError (of which JobError, ModelError, DataError and DoesNotFit are kinds).
    """
    loaded = load_job(job, overrides)
    _require_data(loaded)
    with collector_paused():
        return make(loaded)


def compare(job: JobLike, machines: Sequence[str], overrides: Iterable[str] = ()) -> Comparison:
    """The job planned on each of these machines, by the catalogue's names. Raises UsageError as `plan` does."""
    loaded = load_job(job, overrides)
    _require_data(loaded)
    return make_comparison(loaded, machines)


def plan_inference(job: JobLike | None = None, overrides: Iterable[str] = ()) -> InferencePlan:
    """Plan what the job's `inference` section asks for: memory of prompts and answers, and how long or how many they may be.

    Needs no data, no weights and no accelerator; without a job everything is said in overrides. Raises UsageError as `plan` does.
    """
    if isinstance(job, Job):
        return make_inference(job)
    if isinstance(job, Mapping):
        return make_inference(jobs.from_mapping({"inference": {}, **job}))
    return make_inference(jobs.load(job, overrides, inference=True))


def train(what: Plan | JobLike, *, resume: str | None = None, observers: Sequence[Observer] = ()) -> Run:
    """Run a plan (or plan a job and run it); writes run.json and report.html into the run's folder.

    `resume`: "latest" or a checkpoint's name. Raises UsageError, RunError, or Interrupted after a stop signal.
    """
    chosen = what if isinstance(what, Plan) else plan(what)
    judge = Judge(chosen.job.evaluation, Path(chosen.job.output))
    run = launch(chosen, resume=resume, observers=[judge, *observers])
    before, after = judge.exact_match()
    run = dataclasses.replace(run, answers=judge.answers, exact_match_before=before, exact_match_after=after)
    run.save()
    from sartor.placement.timeline import Timeline

    folder = Path(run.folder)
    write_report(chosen, run, read_metrics(folder), folder / "report.html", timeline=Timeline.read(folder))
    return run


def prepare_data(job: JobLike, overrides: Iterable[str] = ()) -> tuple[DataSets, Any]:
    """The job's data as the model sees it, and the tokenizer that made it. Raises DataError or ModelError."""
    loaded = load_job(job, overrides)
    _require_data(loaded)
    source = resolve(loaded.model)
    tokenizer = load_tokenizer(loaded.model)
    longest = max_length(loaded, source, traits(loaded))
    return prepare(loaded, tokenizer, max_length=longest, vocab_size=source.vocab_size), tokenizer


def _require_data(job: Job) -> None:
    if not jobs.has_data(job):
        raise JobError("`data` is missing: this job can only plan inference", remedy="give `data`, or plan with --inference")
