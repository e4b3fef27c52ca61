"""The command line. Only typer is imported here; every command loads what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sartor.serve import Sampling

app = typer.Typer(
    name="sartor",
    help="Fine-tunes any Hugging Face model on the machine you have: predicts, plans, runs, reports.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Override keys of the job: training.epochs=1", show_default=False),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, a model folder or a hub id.", show_default=False)]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", help="Length limit of an answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.", min=0)]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens that make up this share.", min=0, max=1)]
Seed = Annotated[int | None, typer.Option(help="Of sampling.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda …")]


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the plan as a page to this file as well.")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="Plan answering instead of training; needs no data.")] = False,
    machines: Annotated[
        str, typer.Option("--machines", metavar="A,B,…", help="Compare the job on several machines; names: docs/machines.md.")
    ] = "",
) -> None:
    """Say what a job will need and how it would run; trains nothing."""
    import json

    from sartor import api
    from sartor.report import show_plan, write_plan

    if inference:
        _plan_inference(job, overrides or [], as_json=as_json, html=html)
        return
    if machines:
        _compare(job, overrides or [], machines, as_json=as_json, html=html)
        return
    made = api.plan(job, overrides or ())
    if as_json:
        typer.echo(json.dumps(made.to_mapping(), indent=1, ensure_ascii=False))
    else:
        show_plan(made, _console())
    if html is not None:
        write_plan(made, html)
        typer.echo(f"written: {html}", err=as_json)


def _compare(job: Path, overrides: list[str], machines: str, *, as_json: bool, html: Path | None) -> None:
    import json

    from sartor import api
    from sartor.errors import UsageError
    from sartor.report import show_comparison

    if html is not None:
        raise UsageError("--html shows one plan", remedy="leave out --html or --machines")
    names = [name for name in (part.strip() for part in machines.split(",")) if name]
    made = api.compare(job, names, overrides)
    if as_json:
        typer.echo(json.dumps(made.to_mapping(), indent=1, ensure_ascii=False))
    else:
        show_comparison(made, _console())


def _plan_inference(job: Path, overrides: list[str], *, as_json: bool, html: Path | None) -> None:
    """`JOB.yaml` may be left out: everything can be said in overrides."""
    import json

    from sartor import api
    from sartor.errors import UsageError
    from sartor.report import show_inference

    if html is not None:
        raise UsageError("--html shows plans of training", remedy="leave out --html or --inference")
    bare = "=" in str(job) and not job.exists()
    made = api.plan_inference(None, [str(job), *overrides]) if bare else api.plan_inference(job, overrides)
    if as_json:
        typer.echo(json.dumps(made.to_mapping(), indent=1, ensure_ascii=False))
    else:
        show_inference(made, _console())


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the job's output folder.")] = False,
    checkpoint: Annotated[str | None, typer.Option("--from", help="Resume from this checkpoint, e.g. checkpoint-200.")] = None,
) -> None:
    """Plan a job, run it, and report."""
    from sartor import api
    from sartor.report import Progress, show_plan, show_run

    console = _console()
    made = api.plan(job, overrides or ())
    show_plan(made, console)
    with Progress(console) as progress:
        run = api.train(made, resume=checkpoint or ("latest" if resume else None), observers=[progress])
    show_run(run, console)


@app.command()
def data(
    job: JobFile,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file as well.")] = None,
    count: Annotated[int, typer.Option(help="How many samples to show.", min=1)] = 3,
) -> None:
    """Show samples as the model sees them, coloured by what counts in the loss."""
    from sartor import api
    from sartor.data import render_html, render_terminal

    console = _console()
    sets, tokenizer = api.prepare_data(job, overrides or ())
    render_terminal(sets, tokenizer, console, count)
    if html is not None:
        render_html(sets, tokenizer, html)
        console.print(f"written: {html}")


@app.command()
def machine(
    name: Annotated[str, typer.Argument(help="This machine, or a name of docs/machines.md such as 8xA100-80GB.")] = "auto",
    device: DeviceName = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads that a job would have.", min=1)] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure its rates, for half a minute, and keep them.")] = False,
    folder: Annotated[Path | None, typer.Option("--folder", help="Whose disk to measure; default: the working folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what this machine is, as far as Sartor can use it, and how fast."""
    import json

    from sartor.job.schema import MachineJob
    from sartor.kernels.fuse import as_jobs_run
    from sartor.machine import find_calibration, machine_of, probe
    from sartor.machine.calibrate import calibrate as measure
    from sartor.machine.calibration import Kept
    from sartor.machine.catalogue import lookup
    from sartor.report import machine_mapping, show_machine

    wanted = MachineJob(device=device, threads=threads)
    here = probe(wanted, folders=[folder] if folder else []) if name == "auto" else machine_of(lookup(name))
    kept = find_calibration(here)
    if calibrate:
        if kept.calibration is None and not here.elsewhere:
            typer.echo(f"measuring: {kept.reason}", err=True)
        measured = measure(here, folder=folder, say=lambda what: typer.echo(f"measuring {what}", err=True), as_run=as_jobs_run)
        kept = Kept(path=kept.path, calibration=measured)
    if as_json:
        typer.echo(json.dumps(machine_mapping(here, kept), indent=1, ensure_ascii=False))
    else:
        show_machine(here, _console(), kept)


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer; `-` reads it from standard input.")],
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: DeviceName = "auto",
) -> None:
    """Answer one prompt, or continue a text, with a trained run."""
    from sartor.serve import Session

    text = sys.stdin.read() if prompt == "-" else prompt
    session = Session.open(run, device=device)
    for piece in session.stream(text, _sampling(max_new_tokens, temperature, top_p, seed)):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def chat(
    run: RunFolder,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = None,
    device: DeviceName = "auto",
) -> None:
    """Talk with a trained run, with the chat template it was trained with."""
    from sartor.serve import Session
    from sartor.serve import chat as talk

    talk(Session.open(run, device=device), _sampling(max_new_tokens, temperature, top_p, seed), _console())


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="A new folder for the demo's files and its run.")] = Path("sartor-demo"),
) -> None:
    """The whole story in two minutes, without a network: data page, forecast, training, before and after, measured."""
    from sartor.demo.write import write

    console = _console()
    job = write(folder)
    console.rule("the data, as the model sees it: sartor data")
    data(job, count=2)
    console.rule("the forecast, the training, the measurement: sartor train")
    train(job)
    console.rule("try it")
    console.print(f"sartor generate {folder / 'run'} --prompt '…'     sartor chat {folder / 'run'}", highlight=False)
    console.print(f"{folder} is yours: change {job} and train again with output={folder / 'run2'}", highlight=False)


def _sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> Sampling:
    from sartor.serve import Sampling

    return Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _console() -> Console:
    from rich.console import Console

    return Console()


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that a user can act on are printed without a traceback. Exits with 0, 1, 2, or 128 + signal."""
    from sartor.errors import SartorError

    try:
        app(arguments)
    except SartorError as error:
        typer.echo(f"sartor: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("sartor: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
