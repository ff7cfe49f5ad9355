"""The commands that submit and inspect jobs: submit, curriculum (a chain of jobs), status, cancel, logs.

Function bodies import what they need, so that `--help` is fast; only the step times of GPU jobs import torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from megatron_parallel_r1.cluster.job_registry import RegisteredJob
    from megatron_parallel_r1.cluster.job_spec import JobSpec
    from megatron_parallel_r1.cluster.submission import ResourceRequest

REPOSITORY = Path(__file__).resolve().parents[2]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Submit jobs to SLURM, or run them in the background on a machine without it.",
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe or the file of one stage: its path, or a packaged one's name, such as tiny/demo.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe.")
]
NodesOption = Annotated[
    int | None, typer.Option(min=1, help="Nodes. Resources default to the script's #SBATCH lines.")
]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Processes per node.")]
GpusOption = Annotated[int | None, typer.Option(min=0, help="GPUs per node.")]
CpusOption = Annotated[int | None, typer.Option(min=1, help="CPUs per process.")]
TimeOption = Annotated[str | None, typer.Option(help="Time limit: minutes, HH:MM:SS or D-HH.")]
PartitionOption = Annotated[str | None, typer.Option(help="SLURM partition.")]
AccountOption = Annotated[str | None, typer.Option(help="SLURM account.")]
EvaluateOption = Annotated[
    str | None,
    typer.Option(
        help="Evaluate the release in a further job, with options of `evaluate`: '--benchmarks aime25'."
    ),
]
LocalOption = Annotated[bool, typer.Option("--local", help="Run on this machine even if it has SLURM.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the exact job without submitting it.")]
JobsArgument = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="Job ids. Default: all.")]
ActiveJobsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[JOB]...", help="Job ids. Default: all active jobs.")
]


@app.command()
def submit(
    kind: Annotated[str, typer.Argument(help="sft, rl, distill, curriculum (all stages), eval or doctor.")],
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="As elsewhere; for eval and doctor: -- OPTIONS."),
    ] = None,
    overrides: OverridesArgument = None,
    stage: Annotated[str | None, typer.Option(help="Stage, if the recipe has several of the kind.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=A,B,...: one job per value, as an array; in sequence when local. Repeat for a grid."
        ),
    ] = None,
    chain: Annotated[
        bool,
        typer.Option("--chain", help="A job per stage, as the command `curriculum`."),
    ] = False,
    evaluate: EvaluateOption = None,
    nodes: NodesOption = None,
    ranks: RanksOption = None,
    gpus: GpusOption = None,
    cpus: CpusOption = None,
    time: TimeOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    local: LocalOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Submit a stage, a whole curriculum, a sweep of either, an evaluation, or the doctor."""
    from megatron_parallel_r1.cluster.job_spec import KINDS, RECIPE_KINDS, JobSpec
    from megatron_parallel_r1.cluster.submission import ResourceRequest

    if kind not in KINDS:
        raise UserError(f"unknown kind of job {kind}; choose from {', '.join(KINDS)}")
    request = ResourceRequest(nodes, ranks, gpus, cpus, time, partition, account)
    if evaluate and not chain:
        raise UserError("--evaluate is for a whole curriculum; add --chain")
    if kind not in RECIPE_KINDS:
        if chain or stage or sweep:
            raise UserError(f"{kind} has no stages to chain or sweep; drop --chain, --stage and --sweep")
        arguments = [*([recipe] if recipe else []), *(overrides or ())]
        _submit_specs([JobSpec.read(kind, arguments)], kind, request, local, dry_run)
        return
    if recipe is None:
        raise UserError(f"submit {kind}: give a RECIPE")
    if not chain:
        _submit_jobs(kind, recipe, overrides or (), stage, sweep or (), request, local, dry_run)
    elif kind != "curriculum" or stage or sweep:
        raise UserError("--chain submits a whole curriculum; drop --stage and --sweep")
    else:
        _submit_chain(recipe, overrides or (), evaluate, request, local, dry_run)


@app.command()
def curriculum(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    evaluate: EvaluateOption = None,
    nodes: NodesOption = None,
    ranks: RanksOption = None,
    gpus: GpusOption = None,
    cpus: CpusOption = None,
    time: TimeOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    local: LocalOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Submit one job per stage, each after the stage that it starts from, then the release."""
    from megatron_parallel_r1.cluster.submission import ResourceRequest

    request = ResourceRequest(nodes, ranks, gpus, cpus, time, partition, account)
    _submit_chain(recipe, overrides or (), evaluate, request, local, dry_run)


@app.command()
def status(ids: JobsArgument = None) -> None:
    """Show jobs: state, steps, stage, tokens per second, the last error, and what a pending job waits for."""
    from megatron_parallel_r1.cluster.job_registry import job_statuses, registered_jobs

    logs = _log_folder()
    for status in job_statuses(logs, registered_jobs(logs)):
        if not ids or status.job.id in ids:
            columns = f"{status.job.id:>10}  {status.job.name:<24} {status.state:<10} {status.steps:>6} steps"
            typer.echo("  ".join(filter(None, (columns, status.progress, status.reason))))


@app.command()
def cancel(ids: ActiveJobsArgument = None) -> None:
    """Cancel jobs, and with them the jobs that depend on them."""
    from megatron_parallel_r1.cluster.job_registry import (
        ACTIVE_STATES,
        cancel_job,
        job_statuses,
        registered_jobs,
        select_jobs,
    )

    logs = _log_folder()
    statuses = job_statuses(logs, registered_jobs(logs))
    for job in select_jobs([status.job for status in statuses if status.state in ACTIVE_STATES], ids):
        cancel_job(job)
        typer.echo(f"{job.id}  cancelled")


@app.command()
def logs(
    id: Annotated[str, typer.Argument(metavar="JOB", help="Job id.")],
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to show.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="Last lines of each log.")] = 40,
) -> None:
    """Show the last lines of a job's log and of one rank's."""
    from megatron_parallel_r1.cluster.attempts import last_lines
    from megatron_parallel_r1.cluster.job_registry import registered_jobs, select_jobs

    folder = _log_folder()
    (job,) = select_jobs(registered_jobs(folder), [id])
    files = [folder / f"submitit/{id}/{id}_0_log.out"]
    files += sorted((folder / f"{job.name}-{id}").glob(f"attempt*/rank_{rank}.log"))[-1:]
    for file in files:
        typer.echo(f"{file}\n{last_lines(file, lines)}")


def _submit_jobs(
    kind: str,
    recipe: str,
    overrides: Sequence[str],
    stage: str | None,
    sweeps: Sequence[str],
    request: ResourceRequest,
    local: bool,
    dry_run: bool,
) -> None:
    from megatron_parallel_r1.cluster.job_spec import JobSpec, check_sweep, shared_start, sweep_overrides
    from megatron_parallel_r1.config.reader import find_recipe

    path = find_recipe(Path(recipe)).resolve()  # the job's working directory is the repository
    arguments = [str(path), *overrides, *(("--stage", stage) if stage else ())]
    if not sweeps:
        specs = [JobSpec.read(kind, arguments)]
    else:
        members = sweep_overrides(path, overrides, sweeps)
        specs = [JobSpec.read(kind, [*arguments, *extra]) for extra in members]
        check_sweep(specs)
        if start := shared_start(JobSpec.read(kind, arguments)):
            specs = [JobSpec.read(kind, [*spec.arguments, *start]) for spec in specs]
    _submit_specs(specs, specs[0].stage or kind, request, local, dry_run)


def _submit_specs(
    specs: Sequence[JobSpec], name: str, request: ResourceRequest, local: bool, dry_run: bool
) -> None:
    """Submits one job, or several as an array."""
    from megatron_parallel_r1.cluster.job_registry import RegisteredJob
    from megatron_parallel_r1.cluster.site import has_slurm
    from megatron_parallel_r1.cluster.submission import JobLauncher

    is_local = local or not has_slurm()
    launcher = JobLauncher(REPOSITORY, request, is_local)
    _print_notes(launcher.check(specs, name))
    if dry_run:
        typer.echo(launcher.describe(specs, name))
        return
    commands = [f"{spec.kind} {shlex.join(spec.arguments)}" for spec in specs]
    if is_local:  # one job runs all of them
        commands = [" && ".join(commands)]
    jobs = [
        RegisteredJob(id, name, command, (), is_local)
        for id, command in zip(launcher.submit(specs, name), commands, strict=True)
    ]
    _register(launcher.logs, jobs)


def _submit_chain(
    recipe: str,
    overrides: Sequence[str],
    evaluate: str | None,
    request: ResourceRequest,
    local: bool,
    dry_run: bool,
) -> None:
    from megatron_parallel_r1.cluster.job_registry import RegisteredJob
    from megatron_parallel_r1.cluster.job_spec import JobSpec
    from megatron_parallel_r1.cluster.site import has_slurm
    from megatron_parallel_r1.cluster.submission import JobLauncher
    from megatron_parallel_r1.config.reader import find_recipe, read_recipe

    path = find_recipe(Path(recipe)).resolve()  # the job's working directory is the repository
    arguments = [str(path), *overrides]
    whole = read_recipe(path, overrides)
    starts = {stage.name: whole.start_of(stage) for stage in whole.stages}
    specs = []
    for stage in whole.stages:
        words = [*arguments, "--stage", stage.name]
        if whole.rollout.sync.folder and list(starts.values()).count(starts[stage.name]) > 1:
            # Stages side by side publish weights side by side.
            words.append(f"rollout.sync.folder={whole.rollout.sync.folder / stage.name}")
        specs.append(JobSpec.read(stage.kind, words))
    specs.append(JobSpec.read("curriculum", arguments))
    names = [f"{whole.name}-{spec.stage or 'release'}" for spec in specs]
    needs = {stage.name: whole.needs_of(stage) for stage in whole.stages}
    ends = [stage for stage in needs if not any(stage in needed for needed in needs.values())]
    before: list[list[str | None]] = [[*needed] for needed in needs.values()]
    before.append([*ends])
    what = f"curriculum {shlex.join(arguments)}"
    if evaluate is not None:
        if whole.seeds is not None:
            raise UserError("--evaluate: the recipe has a release for each of its seeds; set seed, not seeds")
        release = whole.out / whole.name / "release"
        specs.append(JobSpec.read("eval", ["--checkpoint", str(release), *shlex.split(evaluate)]))
        names, before = [*names, f"{whole.name}-evaluation"], [*before, [None]]
        what += f" && eval {shlex.join(specs[-1].arguments)}"
    is_local = local or not has_slurm()
    launcher = JobLauncher(REPOSITORY, request, is_local)
    for spec, name in zip(specs, names, strict=True):
        _print_notes(launcher.check([spec], name))
    if dry_run:
        for spec, name, stages in zip(specs, names, before, strict=True):
            after = [f"JOB OF {whole.name}-{stage or 'release'}" for stage in stages]
            typer.echo(launcher.describe([spec], name, after))
        return
    if is_local:
        (id,) = launcher.submit(specs, whole.name)
        _register(launcher.logs, [RegisteredJob(id, whole.name, what, (), True)])
        return
    ids: dict[str | None, str] = {}
    for spec, name, stages in zip(specs, names, before, strict=True):
        ids_before = tuple(ids[stage] for stage in stages)
        (id,) = launcher.submit([spec], name, ids_before)
        command = f"{spec.kind} {shlex.join(spec.arguments)}"
        _register(launcher.logs, [RegisteredJob(id, name, command, ids_before, False)])
        ids[spec.stage] = id


def _register(logs: Path, jobs: Sequence[RegisteredJob]) -> None:
    """Registers submitted jobs and prints them."""
    from megatron_parallel_r1.cluster.job_registry import register_jobs

    register_jobs(logs, jobs)
    for job in jobs:
        typer.echo(f"{job.id}  {job.what}" + (f"  (after {', '.join(job.after)})" if job.after else ""))


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(note, err=True)


def _log_folder() -> Path:
    from megatron_parallel_r1.cluster.site import read_site

    return REPOSITORY / read_site(REPOSITORY / "slurm")["LOG_DIR"]
