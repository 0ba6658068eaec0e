import dataclasses

import jax
import pytest

from spacedrive_jax.aot.plan import make_plan, out_of_memory
from spacedrive_jax.config import load_config
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
