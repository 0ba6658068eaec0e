"""The golden cases of the published SpaceDrive as model and batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.models.spacedrive import SpaceDrive
from tests.golden.verify.spacedrive_case import Case, Weights, build_batch, build_model

GOLDEN = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class PublishedCase:
    model: SpaceDrive
    batch: DrivingBatch
    training: TrainConfig
    tokenizer: DrivingTokenizer
    outputs: dict[str, np.ndarray]
    settings: dict


def load_case(name: str) -> PublishedCase:
    case = Case.open(GOLDEN / name)
    config, training = case.choices(case.settings["spacedrive_args"])
    tokenizer = case.tokenizer()
    model = build_model(config, tokenizer.indicator, Weights([case.folder / "weights.safetensors"]))
    outputs = dict(np.load(case.folder / "outputs.npz"))
    batch = build_batch(case, config, sequence_length=300, max_targets=96)
    return PublishedCase(model, batch, training, tokenizer, outputs, case.settings)
