import dataclasses

import jax
import pytest

from spacedrive_jax.config import load_preset
from spacedrive_jax.scaling.plan import make_plan
from spacedrive_jax.scaling.topology import Chip, Topology
from tests.conftest import ROOT

TINY = load_preset(str(ROOT / "tests" / "tiny_config.py"))


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
