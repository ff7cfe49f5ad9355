"""The commands of `slurm/launch.py`: submit, curriculum, status, cancel, logs."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

from megatron_parallel_r1.cluster.failure import last_lines
from megatron_parallel_r1.cluster.job_registry import UNDER_WAY, Entry, note, noted, statuses
from megatron_parallel_r1.cluster.job_spec import KINDS, Order
from megatron_parallel_r1.cluster.site import has_slurm, read_site
from megatron_parallel_r1.cluster.submission import Launcher, Wish
from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Jobs on SLURM, or on this machine where there is none.",
)

Recipe = Annotated[str, typer.Argument(help="A recipe, or the file of one stage.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Default, as of all: the script's #SBATCH lines.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes of a node.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs of a node.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs of a process.")]
Time = Annotated[str | None, typer.Option(help="Minutes, H:M:S or D-H.")]
Partition = Annotated[str | None, typer.Option()]
Account = Annotated[str | None, typer.Option()]
Local = Annotated[bool, typer.Option("--local", help="On this machine, though it has sbatch.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the exact job and submit nothing.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="Default: all under way.")]


@app.command()
def submit(
    kind: Annotated[str, typer.Argument(help="sft, rl or curriculum (all stages in one job).")],
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage, if there are several of the kind.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="KEY=A,B,...: an array of jobs, locally a row; repeat it for all pairs."),
    ] = None,
    nodes: Nodes = None,
    ranks: Ranks = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    local: Local = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a stage, a whole curriculum, or a sweep of either."""
    if kind not in KINDS:
        raise UserError(f"{kind} is no kind of job; it is one of {', '.join(KINDS)}")
    recipe = str(Path(recipe).resolve())  # a job runs from the repository
    words = [recipe, *(overrides or ()), *(("--stage", stage) if stage else ())]
    orders = [Order.read(kind, [*words, *more]) for more in swept(recipe, overrides or (), sweep or ())]
    is_local = local or not has_slurm()
    launcher = Launcher(REPOSITORY, Wish(nodes, ranks, gpus, cpus, time, partition, account), is_local)
    name = orders[0].stage or kind
    launcher.check(orders, name)
    if dry_run:
        typer.echo(launcher.describe(orders, name))
        return
    ids, told = launcher.submit(orders, name), [order.words for order in orders]
    if is_local:
        told = [(*words, *(f"--sweep={one}" for one in sweep or ()))]
    entries = [
        Entry(id, name, f"{kind} {shlex.join(one)}", None, is_local)
        for id, one in zip(ids, told, strict=True)
    ]
    tell(launcher.logs, entries)


@app.command()
def curriculum(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Nodes = None,
    ranks: Ranks = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    local: Local = False,
    dry_run: DryRun = False,
) -> None:
    """Submit each stage as a job that waits for the one before it, and the release as the last one."""
    given, recipe = list(overrides or ()), str(Path(recipe).resolve())  # a job runs from the repository
    told = read_recipe(Path(recipe), given)
    orders = [Order.read(one.kind, [recipe, *given, "--stage", one.name]) for one in told.stages]
    orders.append(Order.read("curriculum", [recipe, *given]))
    is_local = local or not has_slurm()
    launcher = Launcher(REPOSITORY, Wish(nodes, ranks, gpus, cpus, time, partition, account), is_local)
    names = [f"{told.name}-{order.stage or 'release'}" for order in orders]
    for order, name in zip(orders, names, strict=True):
        launcher.check([order], name)
    if dry_run:
        afters = [None, *(f"JOB OF {name}" for name in names)]
        for order, name, after in zip(orders, names, afters, strict=False):
            typer.echo(launcher.describe([order], name, after))
        return
    if is_local:
        (id,) = launcher.submit(orders, told.name)
        tell(launcher.logs, [Entry(id, told.name, f"curriculum {shlex.join([recipe, *given])}", None, True)])
    else:
        after = None
        for order, name in zip(orders, names, strict=True):
            (id,) = launcher.submit([order], name, after)
            tell(launcher.logs, [Entry(id, name, f"{order.kind} {shlex.join(order.words)}", after, False)])
            after = id


@app.command()
def status(ids: Ids = None) -> None:
    """How jobs are: state, steps done, and why one failed or was never started."""
    folder = log_folder()
    for one in statuses(folder, noted(folder)):
        if one.entry.id in ids if ids else True:
            line = (
                f"{one.entry.id:>10}  {one.entry.name:<24} {one.state:<10} {one.steps:>6} steps  {one.reason}"
            )
            typer.echo(line.rstrip())


@app.command()
def cancel(ids: Ids = None) -> None:
    """End jobs, and those that wait for them."""
    folder = log_folder()
    known = statuses(folder, noted(folder))
    for one in chosen([one.entry for one in known if one.state in UNDER_WAY], ids):
        if one.local:
            end_tree(int(one.id))
        else:
            subprocess.run(["scancel", one.id], check=True)
        typer.echo(f"{one.id}  cancelled")


@app.command()
def logs(
    id: Annotated[str, typer.Argument(metavar="JOB")],
    rank: Annotated[int, typer.Option(min=0)] = 0,
    lines: Annotated[int, typer.Option(min=1)] = 40,
) -> None:
    """The end of what a job and one of its ranks have said."""
    folder = log_folder()
    (entry,) = chosen(noted(folder), [id])
    files = [folder / f"submitit/{id}/{id}_0_log.out"]
    files += sorted((folder / f"{entry.name}-{id}").glob(f"attempt*/rank_{rank}.log"))[-1:]
    for file in files:
        typer.echo(f"{file}\n{last_lines(file, lines)}")


def swept(recipe: str, overrides: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """The overrides of each member of a sweep, with a name of its own; one empty list if there is none.

    Raises:
        UserError: a sweep is not KEY=A,B,...
    """
    if not sweeps:
        return [[]]
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and values):
            raise UserError(f"--sweep {sweep}: write KEY=A,B,... such as seed=1,2,3")
        axes.append([(key, value) for value in values.split(",")])
    name = read_recipe(Path(recipe), overrides).name
    members = []
    for point in itertools.product(*axes):
        own = "_".join(f"{key.rpartition('.')[2]}{value}" for key, value in point)
        members.append([*(f"{key}={value}" for key, value in point), f"name={name}_{own}"])
    return members


def tell(logs: Path, entries: Sequence[Entry]) -> None:
    """Notes jobs that are submitted, and says which they are."""
    note(logs, entries)
    for entry in entries:
        typer.echo(f"{entry.id}  {entry.what}" + (f"  (after {entry.after})" if entry.after else ""))


def log_folder() -> Path:
    return REPOSITORY / read_site(REPOSITORY / "slurm")["LOG_DIR"]


def end_tree(pid: int) -> None:
    """Kills a process with all that it has started; a run goes on from its last checkpoint."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def chosen(entries: Sequence[Entry], ids: Sequence[str] | None) -> list[Entry]:
    """Those with the ids, or all.

    Raises:
        UserError: an id is none of them.
    """
    by_id = {entry.id: entry for entry in entries}
    if unknown := [id for id in ids or () if id not in by_id]:
        raise UserError(f"job {unknown[0]} is none of these: {', '.join(by_id) or 'there is none'}")
    return [by_id[id] for id in ids] if ids else list(by_id.values())
