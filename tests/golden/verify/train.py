"""Losses, gradients and everything between, against a recorded step: kind `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.models.family import IGNORE
from spacedrive_jax.models.spacedrive import SpaceDrive
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.training.losses import losses, select
from spacedrive_jax.training.state import is_trainable
from tests.golden.verify.case_files import read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.ego_frames import memory_checks
from tests.golden.verify.modules import hidden_states
from tests.golden.verify.spacedrive_case import (
    Arrays,
    Case,
    Weights,
    build_batch,
    build_model,
    trainable_rules,
)

HIDDEN = {"atol": 2e-5, "rtol": 1e-4}
COORDINATES = {"atol": 5e-5, "rtol": 1e-4}
LOSS = {"rtol": 1e-5}
GRADIENT = {"atol": 1e-7, "rtol": 1e-4}
"""Terms that cancel, such as the signs that an L1 loss sums, leave no more than their rounding."""
LOSS_VARIANTS = ("huber", "l1", "l2")


def verify_train(folder: Path) -> list[Check]:
    """One recorded training step (kind `train`)."""
    case = Case.open(folder)
    config, training = case.choices(case.settings["spacedrive_args"])
    weights = Weights([folder / "weights.safetensors"])
    batch = build_batch(case, config)
    expected = read_arrays(folder / "outputs.npz")
    return check_step(case, config, training, weights, batch, expected)


def check_step(
    case: Case,
    config: ModelConfig,
    training: TrainConfig,
    weights: Weights,
    batch: DrivingBatch,
    expected: Arrays,
    *,
    vae_trains: bool = True,
) -> list[Check]:
    """Runs one step and compares whatever was recorded.

    Args:
        case: the case.
        config: the model.
        training: its losses.
        weights: recorded weights.
        batch: the recorded inputs.
        expected: the recorded outputs.
        vae_trains: False decodes the `vae`'s present distribution, as the published code does when the
            module is not in training mode.
    """
    model = build_model(config, case.tokenizer().indicator, weights)
    noise = expected.get("vae_noise")
    ours = run_step(model, batch, training, noise, sees_true_coordinates=vae_trains)
    checks = [
        *layout_checks(case.tokenizer(), config, batch, expected),
        *_loss_checks(ours, expected, training),
    ]
    if "losses/pe_scaling" in expected:  # published code logs the scale among the losses
        alpha = np.asarray(model.encoder.scale)
        checks.append(compare("losses/pe_scaling", alpha, expected["losses/pe_scaling"], **LOSS))
    checks += _tensor_checks(model, batch, ours, expected, valid_tokens(batch), training)
    for loss in LOSS_VARIANTS:
        if f"lossvar/{loss}" in expected:
            error = ours["coordinates"][..., :2] - np.asarray(batch.waypoints)
            checks.append(
                compare(f"lossvar/{loss}", _plain_loss(error, loss), expected[f"lossvar/{loss}"], **LOSS)
            )
    return checks + _gradient_checks(case, config, ours["gradients"], expected)


def run_step(
    model: SpaceDrive,
    batch: DrivingBatch,
    training: TrainConfig,
    noise: np.ndarray | None,
    *,
    sees_true_coordinates: bool,
) -> dict[str, Any]:
    """Losses, gradients of the trainables, and what lies between; numpy."""
    graph, trainable, frozen = nnx.split(model, is_trainable(True), ...)
    drawn = None if noise is None else jnp.asarray(noise)

    @jax.jit
    def evaluate(trainable: nnx.State, frozen: nnx.State, batch: DrivingBatch) -> Any:
        def total(trainable: nnx.State) -> tuple[jax.Array, Any]:
            parts = losses(
                nnx.merge(graph, trainable, frozen),
                batch,
                training,
                None,
                noise=drawn,
                sees_true_coordinates=sees_true_coordinates,
            )
            return parts.total, parts

        (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
        model = nnx.merge(graph, trainable, frozen)
        supervised = select(model, batch, training)
        embeddings = model.embeddings(batch)
        position_ids = jnp.swapaxes(batch.position_ids, 0, 1)
        layers = hidden_states(model.vlm.decoder, embeddings, position_ids, lengths=batch.lengths)
        drawn_for = (
            supervised.true_coordinates[:, : supervised.indices.shape[1]] if sees_true_coordinates else None
        )
        outputs = model(batch, indices=supervised.indices, true_coordinates=drawn_for, noise=drawn)
        facts = {
            "parts": parts,
            "embeddings": embeddings,
            "layers": layers,
            "logits": model.vlm.decoder.logits(layers[-1]),
            "at_indicators": outputs.at_indicators,
            "coordinates": outputs.coordinates,
            "supervised": supervised,
            "true_encodings": model.encoder(jnp.pad(supervised.true_coordinates, ((0, 0), (0, 0), (0, 1)))),
            "text_encodings": model.encoder(batch.coordinates),
            "patch_encodings": model.encoder(model.patch_points(batch)),
        }
        return facts, gradients

    facts, gradients = evaluate(trainable, frozen, batch)
    facts = jax.device_get(facts)
    return facts | {"gradients": dict(nnx.to_flat_state(jax.device_get(gradients)))}


def valid_tokens(batch: DrivingBatch) -> Bool[np.ndarray, "B S"]:
    """Where no padding stands."""
    return np.arange(batch.token_ids.shape[1]) < np.asarray(batch.lengths)[:, None]


def layout_checks(
    tokenizer: DrivingTokenizer, config: ModelConfig, batch: DrivingBatch, expected: Arrays
) -> list[Check]:
    """What follows from texts and poses alone: ids, labels, positions, the ego vehicle's past."""
    checks = []
    indicator, position = tokenizer.indicator, tokenizer.position
    equal = {"atol": 0.0, "rtol": 0.0}
    valid = valid_tokens(batch)
    if "input_ids" in expected:
        theirs = np.where(valid, expected["input_ids"], 0)
        checks.append(compare("input_ids", np.where(valid, batch.token_ids, 0), theirs, **equal))
    if "attention_mask" in expected:
        checks.append(compare("attention_mask", valid, expected["attention_mask"], **equal))
    if "labels_for_ce" in expected:
        labels = np.full(batch.token_ids.shape, IGNORE)
        for row, (indices, ids, mask) in enumerate(
            zip(batch.target_indices, batch.target_ids, batch.target_mask, strict=True)
        ):
            labels[row, np.asarray(indices)[np.asarray(mask)] + 1] = np.asarray(ids)[np.asarray(mask)]
        checks.append(compare("labels_for_ce", labels, expected["labels_for_ce"], **equal))
        if "labels_in" in expected:
            # Before the position tokens behind supervised indicators are taken out.
            behind = np.roll(labels, 1, axis=1) == indicator
            given = np.where(behind & (batch.token_ids == position), position, labels)
            checks.append(compare("labels_in", given, expected["labels_in"], **equal))
    if expected.get("position_ids", np.zeros(0)).size:
        ours = np.swapaxes(np.asarray(batch.position_ids), 0, 1)
        theirs = np.where(valid, expected["position_ids"], 0)
        checks.append(compare("position_ids", np.where(valid, ours, 0), theirs, **equal))
    if config.ego_status != "none":
        checks += memory_checks("", np.asarray(batch.ego_status), expected)
    return checks


def _loss_checks(ours: dict[str, Any], expected: Arrays, training: TrainConfig) -> list[Check]:
    parts = ours["parts"]
    recorded = {
        "losses/vlm_loss": parts.language,
        "losses/loss_vae_gen": parts.divergence,
        "losses/total": parts.total,
    }
    checks = [
        compare(name, value, expected[name], **LOSS) for name, value in recorded.items() if name in expected
    ]
    if "losses/loss_pos" in expected:
        # The published loss is recorded with its weight.
        weighted = training.position_weight * parts.position
        checks.append(compare("losses/loss_pos", weighted, expected["losses/loss_pos"], **LOSS))
    return checks


def _plain_loss(error: np.ndarray, kind: str) -> float:
    size = np.abs(error)
    if kind == "huber":
        return float(np.mean(np.where(size < 1, 0.5 * size**2, size - 0.5)))
    return float(np.mean(size if kind == "l1" else size**2))


def _tensor_checks(
    model: SpaceDrive,
    batch: DrivingBatch,
    ours: dict[str, Any],
    expected: Arrays,
    valid: np.ndarray,
    training: TrainConfig,
) -> list[Check]:
    checks: list[Check] = []

    def check(
        name: str, value: Any, tolerance: dict[str, float], *, theirs: np.ndarray | None = None
    ) -> None:
        if name in expected:
            checks.append(compare(name, value, expected[name] if theirs is None else theirs, **tolerance))

    def tokens(name: str, value: np.ndarray, step: int = 1) -> None:
        """Compares per-token arrays at valid tokens (what stands in the padding means nothing)."""
        if name in expected:
            kept = valid[:, ::step]
            theirs = expected[name][kept]
            checks.append(compare(name, value[:, ::step][kept], theirs, **HIDDEN))

    layers, last = ours["layers"], ours["layers"][-1]
    tokens("inputs_embeds", ours["embeddings"])
    for index in range(len(layers)):
        tokens(f"hidden_states/{index}", layers[index])
    tokens("last_hidden_state_normed", last)
    tokens("last_hidden_state_normed_every4", last, 4)
    tokens("logits", ours["logits"])
    for step in (4, 16):
        tokens(f"logits_every{step}", ours["logits"], step)

    token_type_ids = np.asarray(batch.token_type_ids)
    coordinates = token_type_ids == TokenType.COORDINATE
    check("inputs_embeds_at_pos_embedding_tokens", ours["embeddings"][coordinates], HIDDEN)
    ego = (token_type_ids == TokenType.EGO_FEATURE) | (token_type_ids == TokenType.EGO_POSITION)
    if "ego_feature" in expected:
        ours_ego = ours["embeddings"][ego].reshape(expected["ego_feature"].shape)
        check("ego_feature", ours_ego, {"atol": 2e-4, "rtol": 1e-5})
    if "image_embeds" in expected and model.config.visual_positions == "add":
        image = ours["embeddings"][token_type_ids == TokenType.IMAGE] - ours["patch_encodings"].reshape(
            -1, last.shape[-1]
        )
        check("image_embeds", image.reshape(expected["image_embeds"].shape), HIDDEN)
    check("pos_emb", ours["patch_encodings"], {"atol": 5e-5, "rtol": 1e-5})
    if "io_coords_pos" in expected:
        rows = [ours["text_encodings"][row, : int(count)] for row, count in enumerate(coordinates.sum(1))]
        if not model.config.decoder.whole_trajectory:
            check("io_coords_pos", np.concatenate(rows)[None], HIDDEN)

    mask = np.asarray(ours["supervised"].mask)
    indices = mask[:, : ours["at_indicators"].shape[1]]

    def chosen(name: str, value: np.ndarray, rows: np.ndarray, tolerance: dict[str, float]) -> None:
        if name in expected:
            theirs = expected[name]
            checks.append(compare(name, value[rows].reshape(theirs.shape), theirs, **tolerance))

    chosen("output_pos", ours["at_indicators"], indices, HIDDEN)
    if training.supervision != "first" and not model.config.decoder.whole_trajectory:
        chosen("gt_pos", ours["true_encodings"], mask, HIDDEN)
    chosen("gt_coords_xy", ours["supervised"].true_coordinates, mask, {"atol": 1e-6, "rtol": 0.0})
    if not model.config.decoder.is_grid:
        whole = model.config.decoder.whole_trajectory
        chosen("decoded_coords", ours["coordinates"], mask if whole else indices, COORDINATES)
    return checks


def _gradient_checks(
    case: Case, config: ModelConfig, gradients: dict[Any, Any], expected: Arrays
) -> list[Check]:
    indicator = case.tokenizer().indicator
    ours: dict[str, np.ndarray] = {}
    for rule in trainable_rules(config, indicator):
        gradient = np.asarray(gradients[rule.target][...])
        for layer, name in enumerate(rule.source_names()):
            ours[name] = rule.export(gradient if rule.layers is None else gradient[layer])
    if case.is_llava:
        # The published hooks let the two new rows of the full tables through.
        tables = {"lm_head.weight": "new_head", "model.language_model.embed_tokens.weight": "new_embedding"}
        for name, path in tables.items():
            recorded = expected.get(f"grad/{name}")
            if recorded is not None:
                ours[name] = np.zeros_like(recorded)
                ours[name][indicator : indicator + 2] = gradients["vlm", "decoder", path][...]
    checks = [
        compare(f"grad/{name}", gradient.reshape(recorded.shape), recorded, **GRADIENT)
        for name, gradient in ours.items()
        if (recorded := expected.get(f"grad/{name}")) is not None
    ]
    for flag in (name for name in expected if name.startswith("grad/") and name.endswith("::is_none")):
        # torch's None: nothing reached the parameter. Here it is not trained, or its gradient is zero.
        gradient = ours.get(flag.removeprefix("grad/").removesuffix("::is_none"))
        nothing = gradient is None or (bool(expected[flag]) and not gradient.any())
        checks.append(compare(flag, np.asarray(nothing), expected[flag], atol=0.0, rtol=0.0))
    return checks
