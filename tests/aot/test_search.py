"""The search's decisions, with compiling replaced by a formula."""

import dataclasses

import jax
import pytest

from spacedrive_jax.aot import search as searching
from spacedrive_jax.aot.plan import Plan
from spacedrive_jax.aot.search import POLICIES, cost, estimate, read_results, search, search_space
from spacedrive_jax.config import MeshConfig, load_config
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.training.throughput import Topology
from tests.conftest import ROOT

CONFIG = load_config(str(ROOT / "tests" / "tiny_config.py"))
MACHINE = Topology("cpu:4", None, tuple(jax.devices("cpu")[:1]) * 4)


def pretend(config, topology, *, step, limit=None):
    """A plan by formula: larger batches and policies that keep more take more memory and less time."""
    mesh, batch, remat = config.mesh, config.train.batch_size, config.model.compute.remat
    if mesh.tensor == 2:
        raise ConfigError("does not lie along the machine's links")
    kept = batch * (1 + POLICIES.index(remat)) / (mesh.data * mesh.fsdp)
    peak = int(100 / mesh.fsdp + 10 * kept)
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Plan)), 0)
    return Plan(
        **fields
        | {
            "topology": topology.name,
            "mesh": dataclasses.asdict(mesh),
            "batch_size": batch,
            "remat": remat,
            "attention": "xla",
            "step": step,
            "fits": peak <= 80,
            "reason": "" if peak <= 80 else f"needs {peak}",
            "peak_bytes": peak,
            "collectives": (),
            "dcn_collectives": (),
            "step_seconds": batch + 1.0 - 0.1 * POLICIES.index(remat),
            "compile_seconds": 1.0,
        }
    )


@pytest.fixture
def compiled(monkeypatch):
    """Candidates that were compiled, in order."""
    seen = []

    def record(config, topology, *, step):
        plan = pretend(config, topology, step=step)
        seen.append(config)
        return plan

    monkeypatch.setattr(searching, "make_plan", record)
    return seen


def test_search_space_holds_only_what_can_run():
    candidates = list(search_space(CONFIG, 4))
    for each in candidates:
        assert each.mesh.data * each.mesh.fsdp * each.mesh.tensor == 4
        assert each.train.batch_size % (each.mesh.data * each.mesh.fsdp) == 0
    assert len(set(candidates)) == len(candidates)
    assert {each.mesh for each in candidates} >= {
        MeshConfig(1, 4, 1),
        MeshConfig(4, 1, 1),
        MeshConfig(1, 2, 2),
    }
    assert {each.train.batch_size for each in candidates} == {4, 8, 16}
    assert {each.model.compute.remat for each in candidates} == set(POLICIES)
    planning = list(search_space(CONFIG, 4, step="plan", batch_size=4))
    assert {(each.train.batch_size, each.model.compute.remat) for each in planning} == {(4, "none")}
    # Twelve chips: the factor of three goes to data.
    assert {each.mesh.data % 3 for each in search_space(CONFIG, 12)} == {0}


def test_what_takes_more_than_what_did_not_fit_is_not_compiled(compiled):
    candidates = list(search_space(CONFIG, 4))
    trials = list(search(candidates, MACHINE, limit=1000))
    assert {trial.config for trial in trials} == set(candidates)
    assert len(compiled) < len(candidates)
    for trial in trials:
        if trial.plan is None and "takes more than" in trial.refusal:
            assert not pretend(trial.config, MACHINE, step="train").fits
    refusals = {trial.refusal for trial in trials if trial.config.mesh.tensor == 2}
    assert refusals == {"does not lie along the machine's links"}
    best = min((trial.plan for trial in trials if trial.plan and trial.plan.fits), key=cost)
    whole = [pretend(each, MACHINE, step="train") for each in candidates if each.mesh.tensor != 2]
    assert cost(best) == min(cost(plan) for plan in whole if plan.fits)


def test_the_limit_counts_compilations_and_the_rest_goes_on_from_a_file(compiled, tmp_path):
    candidates, results = list(search_space(CONFIG, 4)), tmp_path / "plans.json"
    first = list(search(candidates, MACHINE, limit=3, results=results))
    assert len(compiled) == 3
    assert len(read_results(results)) == 3
    list(search(candidates, MACHINE, limit=1000, results=results))
    whole = list(search(candidates, MACHINE, limit=0, results=results))
    assert len(compiled) == len(set(compiled))
    assert {trial.config for trial in first} <= {trial.config for trial in whole}
    assert all(trial.known for trial in whole if trial.plan is not None)


def test_the_guess_prefers_less_communication_and_no_recomputation():
    config = load_config("spacedrive_plus_qwen_7b")

    def guess(mesh, remat="full"):
        compute = dataclasses.replace(config.model.compute, remat=remat)
        model = dataclasses.replace(config.model, compute=compute)
        return estimate(dataclasses.replace(config, mesh=mesh, model=model), MACHINE)

    assert guess(MeshConfig(4, 1, 1)) < guess(MeshConfig(1, 4, 1)) < guess(MeshConfig(1, 1, 4))
    assert guess(MeshConfig(4, 1, 1), "dots") < guess(MeshConfig(4, 1, 1))
