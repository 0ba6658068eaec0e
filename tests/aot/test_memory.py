import dataclasses

import jax
import pytest

from spacedrive_jax.aot.plan import _planning, make_plan, out_of_memory
from spacedrive_jax.config import change, load_config
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.inference.generate import planning_step
from spacedrive_jax.models.families import family_of
from spacedrive_jax.training.sharding import make_mesh
from spacedrive_jax.training.state import abstract_state
from spacedrive_jax.training.throughput import Chip, Topology
from tests.conftest import ROOT

TINY = load_config(str(ROOT / "tests" / "tiny_config.py"))


def with_remat(config, remat):
    compute = dataclasses.replace(config.model.compute, remat=remat)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute=compute))


@pytest.mark.parametrize("remat", ["full", "none"])
def test_no_step_takes_less_than_its_shapes_say(remat):
    plan = make_plan(with_remat(TINY, remat), Topology("cpu:1", None, tuple(jax.devices("cpu")[:1])))
    assert plan.fits
    assert 0 < plan.activation_bytes < plan.temporary_bytes
    least = plan.parameter_bytes + plan.optimizer_bytes + plan.batch_bytes + plan.activation_bytes
    assert least < plan.peak_bytes


def test_what_cannot_fit_is_not_compiled():
    small = Chip("small", 1e12, hbm_bytes=400_000, hbm_bandwidth=1e11, interconnect=1e11)
    machine = Topology("small:1", small, tuple(jax.devices("cpu")[:1]))
    plan = make_plan(with_remat(TINY, "none"), machine)
    assert not plan.fits
    assert plan.compile_seconds == 0
    assert "of a small's 0.0 GB by its shapes; not compiled" in plan.reason
    assert plan.peak_bytes > small.hbm_bytes


def test_the_planning_step_is_the_one_that_predict_runs():
    """With its longest answer: a path has more tokens than the published limit."""
    config = change(TINY, "path", {"model.path_points": 20, "train.grad_accum_steps": 2})
    mesh = make_mesh(config.mesh, jax.devices("cpu")[:1])
    tokenizer = load_tokenizer(config.data.tokenizer, family_of(config.model.vlm).chat)
    program = _planning(config, mesh)
    assert program.run is planning_step(abstract_state(config, mesh)[0], mesh, config, tokenizer)
    # Pieces of a training step do not cut a batch of prompts.
    decoder, train = config.model.vlm.decoder, config.train
    token = 2 * decoder.num_kv_heads * decoder.head_dim * 4
    assert program.kept_bytes == decoder.num_layers * train.batch_size * config.data.sequence_length * token


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(47.5G) exceeds available HBM (15.75G).",
            int(47.5 * (1 << 30)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 512.0M of 15.75G hbm.\n\nTotal hbm usage",
            512 << 20,
        ),
        ("RESOURCE_EXHAUSTED: no numbers", 0),
    ],
)
def test_a_compilers_need_is_read_from_its_words(message, expected):
    assert out_of_memory(message)[0] == expected
    assert out_of_memory("INTERNAL: something else") is None
