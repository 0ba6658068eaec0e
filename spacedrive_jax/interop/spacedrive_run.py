"""Which run of this project a published SpaceDrive checkpoint means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from spacedrive_jax.config import Config, TrainConfig, load_config
from spacedrive_jax.errors import CheckpointError
from spacedrive_jax.interop.families import published_of
from spacedrive_jax.interop.importing import ImportOptions
from spacedrive_jax.interop.spacedrive_config import (
    PublishedConfig,
    data_config,
    model_config,
    parse_published_config,
    read_published_config,
    train_config,
)
from spacedrive_jax.interop.spacedrive_tensors import Parts
from spacedrive_jax.models.config import LoraConfig, VLConfig
from spacedrive_jax.models.coordinate_encoder import frequency_table
from spacedrive_jax.models.spacedrive_config import ModelConfig

FREQUENCIES = "position_encoder.freq"
FREQUENCY_TOLERANCE = 1e-5
"""Relative; torch's vectorised power is off by two units in the last place."""
LOSS_FIELDS = ("position_loss", "huber_delta", "position_weight", "supervision")
UNTRACED = ("visual_positions", "position_input", "semantic_position")
"""Fields of a model that leave no trace in a checkpoint."""


def published_run(
    parts: Parts, vlm: VLConfig, lora: LoraConfig, options: ImportOptions, origin: str
) -> tuple[Config, list[str]]:
    """The run that a checkpoint means.

    The model follows from the published config, which `--published-config` names or the checkpoint carries in
    its `meta`; without one, from the preset. Data and training settings are the preset's where one is given,
    else the published ones.

    Args:
        parts: the checkpoint.
        vlm: its base.
        lora: its adapters.
        options: names the published config and the preset.
        origin: what to call the checkpoint.

    Returns:
        The run, and what had to be assumed.

    Raises:
        CheckpointError: the published config cannot be read or means nothing this project knows, or the
            checkpoint's frequencies are not its encoder's.
    """
    preset = load_config(options.preset or _preset_of(parts, vlm))
    published = _published_config(parts, options, origin)
    notes = []
    if published is None:
        model = dataclasses.replace(preset.model, vlm=vlm, lora=lora, weights=None)
        settings = ", ".join(f"model.{name} {getattr(model, name)}" for name in UNTRACED)
        notes.append(
            f"the checkpoint does not say how it was trained: {settings} are those of {preset.name} "
            "(--published-config FILE tells)"
        )
        run = dataclasses.replace(preset, model=model)
    else:
        if not published.model.get("io_3d_pos", False):
            raise CheckpointError(
                f"{origin}: its config has io_3d_pos False, with which the published code cannot train"
            )
        model = model_config(published.model, vlm, lora, preset.model.compute)
        data = preset.data
        if options.preset is None:
            data = data_config(published.model, published.loader, data)
        train = _with_losses(preset.train, train_config(published.model))
        run = dataclasses.replace(preset, model=model, data=data, train=train)
    check_frequencies(model, parts.buffers, origin)
    return dataclasses.replace(run, name="published_spacedrive", run_dir=None), notes


def _published_config(parts: Parts, options: ImportOptions, origin: str) -> PublishedConfig | None:
    if options.published_config is not None:
        return read_published_config(options.published_config)
    text = parts.meta.get("config")
    return parse_published_config(text, f"{origin}, meta.config") if isinstance(text, str) else None


def _preset_of(parts: Parts, vlm: VLConfig) -> str:
    """The published run of the family, with ego status where the checkpoint has its MLP."""
    has_ego = any(name.startswith("ego_status_mlp") for name in parts.heads)
    return published_of(vlm).presets[has_ego]


def _with_losses(train: TrainConfig, losses: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, **{name: getattr(losses, name) for name in LOSS_FIELDS})


def check_frequencies(model: ModelConfig, buffers: Mapping[str, np.ndarray], origin: str) -> None:
    """Compares the encoder's frequencies with those that the checkpoint keeps.

    Raises:
        CheckpointError: they differ, naming the fields.
    """
    held = buffers.get(FREQUENCIES)
    if held is None:
        return
    ours = frequency_table(model.encoder, model.vlm.decoder.hidden_size)
    same = held.shape == ours.shape and np.allclose(
        np.asarray(held, np.float32), ours, rtol=FREQUENCY_TOLERANCE, atol=0
    )
    if not same:
        encoder = model.encoder
        raise CheckpointError(
            f"{origin}: {FREQUENCIES} runs from {held.flat[0]:.6g} to {held.flat[-1]:.6g} ({held.size}), but "
            f"model.encoder.kind {encoder.kind}, base {encoder.base:g} and frequency_scaling "
            f"{encoder.frequency_scaling:g} (published pe_type, pe_freq_coeff, pe_freq_scaling) give "
            f"{ours[0]:.6g} to {ours[-1]:.6g} ({ours.size}): give its --published-config, or a --config"
        )
