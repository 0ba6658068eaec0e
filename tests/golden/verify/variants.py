"""One small model under many settings, against recorded steps: kind `variants`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.console import progress
from spacedrive_jax.errors import DataError
from spacedrive_jax.interop.spacedrive_tensors import head_rules
from spacedrive_jax.models.spacedrive import SpaceDrive
from tests.golden.verify.case_files import Recorded, choose, read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.spacedrive_case import Arrays, Case, Weights, build_batch, build_model
from tests.golden.verify.train import COORDINATES, GRADIENT, HIDDEN, LOSS, check_step, layout_checks

KNOWN_OPTIONS = {"plan_only_text", "single", "no_gt", "vae_noise", "vae_train"}
"""What a setting's `opts` may say; `single` and `vae_noise` show in its arrays."""


def verify_variants(folder: Path, only: Collection[str] = ()) -> list[Check]:
    """Every setting of a case, or those named in `only`.

    Settings that the published code could not run recorded an error and nothing to compare.

    Raises:
        DataError: an unknown name or option, or an incomplete case.
    """
    case = Case.open(folder)
    runnable = [name for name, entry in case.settings["variants"].items() if "spacedrive_args" in entry]
    chosen = progress(choose(runnable, only, folder), desc="comparing settings", unit="setting")
    return [
        dataclasses.replace(check, name=f"{name}/{check.name}")
        for name in chosen
        for check in _variant_checks(case, name, case.settings["variants"][name])
    ]


def _variant_checks(case: Case, name: str, variant: Mapping[str, Any]) -> list[Check]:
    options = variant.get("opts", {})
    if unknown := options.keys() - KNOWN_OPTIONS:
        raise DataError(f"{case.folder}: setting {name} has unknown opts {', '.join(sorted(unknown))}")
    config, training = case.choices(variant["spacedrive_args"])
    extra = case.settings.get("extra_weights_file_of_variant", {}).get(name)
    weights = Weights([case.folder / file for file in ("weights.safetensors", extra) if file])
    expected = read_arrays(case.folder / f"outputs_{name}.npz")
    images_recorded = True
    if options.get("plan_only_text"):
        case, images_recorded = _plan_only(case)
    batch = build_batch(
        case,
        config,
        texts={key[3:]: expected[key] for key in expected if key.startswith("in/")},
        supervise_positions=bool(variant["spacedrive_args"].get("supervise_semantic_posemb")),
        has_future=False if options.get("no_gt") else None,
    )
    if not images_recorded:
        model = build_model(config, case.tokenizer().indicator, weights)
        return [
            *layout_checks(case.tokenizer(), config, batch, expected),
            *_coordinate_checks(model, batch, expected),
            *_text_checks(model, batch, expected),
            *_head_checks(model, training, expected),
        ]
    vae_trains = bool(options.get("vae_train"))
    return check_step(case, config, training, weights, batch, expected, vae_trains=vae_trains)


def _plan_only(case: Case) -> tuple[Case, bool]:
    """The case whose conversations have no second round, and whether its images are there.

    Its frames were drawn anew. Where their images were not recorded, others stand in for them: what depends
    on them cannot be compared.
    """
    plan = {key[5:]: value for key, value in case.inputs.items() if key.startswith("plan/") and value.size}
    recorded = f"f{case.frame}/pixel_values" in plan
    return dataclasses.replace(case, inputs=Recorded(case.inputs.origin, case.inputs | plan)), recorded


def _coordinate_checks(model: SpaceDrive, batch: DrivingBatch, expected: Arrays) -> Iterator[Check]:
    """The encodings of the coordinates in the text (B = 1)."""
    if "io_coords_pos" in expected:
        theirs = expected["io_coords_pos"]
        ours = model.encoder(batch.coordinates)[:, : theirs.shape[1]]
        yield compare("io_coords_pos", ours, theirs, **HIDDEN)
    if "inputs_embeds_at_pos_embedding_tokens" in expected and not model.config.position_input:
        name = "inputs_embeds_at_pos_embedding_tokens"
        ours = model.vlm.embed(batch.token_ids)[batch.token_type_ids == TokenType.COORDINATE]
        yield compare(name, ours, expected[name], **HIDDEN)
    if "gt_coords_xy" in expected:
        theirs = expected["gt_coords_xy"]
        yield compare("gt_coords_xy", np.reshape(batch.waypoints, theirs.shape), theirs, atol=1e-6, rtol=0.0)


def _text_checks(model: SpaceDrive, batch: DrivingBatch, expected: Arrays) -> Iterator[Check]:
    """The language model before the first image, and its scores of recorded hidden states (B = 1)."""
    name, recorded = "last_hidden_state_normed_every4", expected.get("last_hidden_state_normed_every4")
    if recorded is None:
        return
    graph, state = nnx.split(model)
    hidden = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch).hidden)(state, batch)
    before_images = int(np.argmax(np.asarray(batch.token_type_ids)[0] == TokenType.IMAGE))
    count = len(range(0, before_images, 4))
    yield compare(f"{name}, before the images", hidden[:, ::4][:, :count], recorded[:, :count], **HIDDEN)
    if "logits_every16" in expected:
        ours = model.vlm.decoder.logits(jnp.asarray(recorded[:, ::4]))
        yield compare("logits_every16, of recorded states", ours, expected["logits_every16"], **HIDDEN)


def _head_checks(model: SpaceDrive, training: TrainConfig, expected: Arrays) -> list[Check]:
    """Coordinates, position loss and the head's gradients from recorded hidden states (B = 1)."""
    graph, head, rest = nnx.split(model, lambda path, _: path[0] == "decoder", ...)
    hidden, truth = jnp.asarray(expected["output_pos"]), jnp.asarray(expected["gt_coords_xy"])

    def loss(head: nnx.State) -> tuple[jax.Array, jax.Array]:
        decoded = nnx.merge(graph, head, rest).decode_coordinates(hidden)
        error = decoded[..., :2] - truth
        huber = optax.huber_loss(error, delta=training.huber_delta)
        return training.position_weight * jnp.mean(huber), decoded

    (value, decoded), gradients = jax.value_and_grad(loss, has_aux=True)(head)
    theirs = expected["decoded_coords"]
    checks = [
        compare("decoded_coords", np.asarray(decoded).reshape(theirs.shape), theirs, **COORDINATES),
        compare("losses/loss_pos", value, expected["losses/loss_pos"], **LOSS),
    ]
    flat = dict(nnx.to_flat_state(gradients))
    for rule in head_rules(model.config, alpha_shape=(1,)):
        name = f"grad/{rule.source}"
        if rule.target[0] == "decoder" and name in expected:
            ours = rule.export(np.asarray(flat[rule.target][...]))
            checks.append(compare(name, ours, expected[name], **GRADIENT))
    return checks
