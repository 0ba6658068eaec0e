"""SpaceDrive in JAX: a vision-language model that reads and writes 3D positions, and drives.

    from spacedrive_jax import Planner

    planner = Planner.load("runs/demo")
    plan = planner.plan(planner.records("data/records", "val")[0])
    print(plan.waypoints, plan.text)
    plan.figure().savefig("plan.png")

Everything here is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spacedrive_jax.batch import DrivingBatch
    from spacedrive_jax.config import Config, load_config
    from spacedrive_jax.data.frame import Frame, read_frame
    from spacedrive_jax.data.records import open_records
    from spacedrive_jax.errors import CheckpointError, ConfigError, DataError, SpaceDriveError
    from spacedrive_jax.evaluation.validation import train
    from spacedrive_jax.inference.open_model import open_model
    from spacedrive_jax.inference.open_planner import open_planner, plan
    from spacedrive_jax.inference.planner import Plan
    from spacedrive_jax.models.spacedrive import SpaceDrive
    from spacedrive_jax.reporting.show import KeyframePlan, Planner
    from spacedrive_jax.training.step import batch_spec, fake_batch
    from spacedrive_jax.training.weights import with_weights

__version__ = "0.1.0"

_WHERE = {
    "CheckpointError": "errors",
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "DrivingBatch": "batch",
    "Frame": "data.frame",
    "KeyframePlan": "reporting.show",
    "Plan": "inference.planner",
    "Planner": "reporting.show",
    "SpaceDrive": "models.spacedrive",
    "SpaceDriveError": "errors",
    "batch_spec": "training.step",
    "fake_batch": "training.step",
    "load_config": "config",
    "open_model": "inference.open_model",
    "open_planner": "inference.open_planner",
    "open_records": "data.records",
    "plan": "inference.open_planner",
    "read_frame": "data.frame",
    "train": "evaluation.validation",
    "with_weights": "training.weights",
}

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DrivingBatch",
    "Frame",
    "KeyframePlan",
    "Plan",
    "Planner",
    "SpaceDrive",
    "SpaceDriveError",
    "batch_spec",
    "fake_batch",
    "load_config",
    "open_model",
    "open_planner",
    "open_records",
    "plan",
    "read_frame",
    "train",
    "with_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
