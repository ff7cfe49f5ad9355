from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.daemons import Daemons, missing
from tests.slurm.jobs import RUN, Site


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """A SLURM cluster of three nodes, shared by all tests; each test leaves all nodes idle."""
    if reason := missing():
        pytest.skip(reason)
    daemons = Daemons(tmp_path_factory.mktemp("slurm"), ("n1", "n2", "n3"))
    try:
        daemons.start()
        yield daemons
    finally:
        daemons.stop()


@pytest.fixture
def site(slurm: Daemons, tmp_path: Path) -> Iterator[Site]:
    yield Site(slurm, tmp_path)
    slurm.client("scancel", "--state=RUNNING")
    slurm.client("scancel", "--state=PENDING")
    slurm.wait_for(slurm.all_idle, "idle nodes")


@pytest.fixture(scope="session")
def undisturbed(slurm: Daemons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run over two nodes, data-parallel."""
    site = Site(slurm, tmp_path_factory.mktemp("undisturbed"))
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs")
    site.finish(job)
    assert (site.logs(job) / "attempt0/rank_1.log").is_file()
    run = site.folder / "runs/mini"
    before, after = (load_file(run / f"{stage}/model/model.safetensors") for stage in ("cold_start", "rl"))
    assert all(not torch.equal(before[name], after[name]) for name in after)  # else equality proves nothing
    return run
