"""Generated ids, coordinates and text against recorded runs: kind `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spacedrive_jax.batch import DrivingBatch, TokenType
from spacedrive_jax.console import progress
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.inference.answers import Generation, answer_text
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.inference.progress import position_embedding
from spacedrive_jax.models.coordinate_decoder import GridDecoder
from spacedrive_jax.models.spacedrive import SpaceDrive
from tests.golden.verify.case_files import choose, read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.coordinate_encoding import best_cell
from tests.golden.verify.one_pass import one_pass_checks
from tests.golden.verify.spacedrive_case import Arrays, Case, Weights, build_batch, build_model

LOGITS = {"atol": 5e-5, "rtol": 1e-4}
COORDINATES = {"atol": 2e-4, "rtol": 1e-4}
GRID_COORDINATES = {"atol": 5e-3, "rtol": 0.0}
EQUAL = {"atol": 0.0, "rtol": 0.0}
SURE_MARGIN = 1e-2
"""Ids are only as exact as the gap between the two best scores: below it a comparison stops."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One recorded run."""

    name: str
    """Suffix of its files; empty for the default run."""
    arguments: dict[str, Any]
    facts: dict[str, Any]
    """What config.json records of it: text, margins."""
    repetition_penalty: float = 1.0


def verify_generate(folder: Path, only: Collection[str] = ()) -> list[Check]:
    """Every recorded run of a case, or those named in `only`.

    Raises:
        DataError: an unknown name, or an incomplete case.
    """
    case = Case.open(folder)
    runs = {variant.name or "default": variant for variant in variants(case)}
    return [
        dataclasses.replace(check, name=f"{name}/{check.name}")
        for name in progress(choose(runs, only, folder), desc="comparing settings", unit="setting")
        for check in check_variant(case, runs[name])
    ]


def variants(case: Case) -> list[Variant]:
    """The runs that a case's settings name and its folder holds."""
    base, found = case.settings["spacedrive_args"], []
    for name, facts in case.settings.get("variants", {"default": {}}).items():
        overrides = dict(facts.get("overrides", {}))
        penalty = overrides.pop("rp", 1.0)
        overrides.pop("double", None)  # another head, which has a weights file of its own
        found.append(Variant("" if name == "default" else name, {**base, **overrides}, facts, penalty))
    for name, facts in case.settings.get("variants_rebuilt", {}).items():
        found.append(Variant(name, facts["spacedrive_args"], facts))
    return [variant for variant in found if (case.folder / _file("outputs", variant, "npz")).is_file()]


def _file(stem: str, variant: Variant, suffix: str) -> str:
    return f"{stem}{'_' if variant.name else ''}{variant.name}.{suffix}"


def check_variant(case: Case, variant: Variant) -> list[Check]:
    """Runs one variant and compares whatever was recorded of it."""
    folder, tokenizer = case.folder, case.tokenizer()
    expected = read_arrays(folder / _file("outputs", variant, "npz"))
    config, _ = case.choices(variant.arguments)
    own = folder / _file("weights", variant, "safetensors")
    files = [folder / "weights.safetensors", *([own] if variant.name and own.is_file() else [])]
    model = build_model(config, tokenizer.indicator, Weights(files))
    batch = build_batch(case, config)
    limit = int(case.settings["max_new_tokens"])
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: DrivingBatch) -> tuple[Generation, dict[str, Array]]:
        model = nnx.merge(graph, state)
        answer = generate(model, batch, tokenizer, limit, repetition_penalty=variant.repetition_penalty)
        return answer, replay(model, batch, tokenizer, answer)

    answer, facts = jax.device_get(run(state, batch))
    return [
        *_prompt_checks(batch, facts, expected),
        *_answer_checks(
            case,
            variant,
            tokenizer,
            answer,
            facts,
            expected,
            is_grid=config.decoder.is_grid,
            has_position_input=config.position_input,
        ),
        *one_pass_checks(model, batch, tokenizer, limit, variant.repetition_penalty, answer),
    ]


def replay(
    model: SpaceDrive, batch: DrivingBatch, tokenizer: DrivingTokenizer, answer: Generation
) -> dict[str, Array]:
    """Runs prompt and answer once more without a cache, to see what lies between (B = 1).

    Returns:
        Prompt embeddings, embeddings fed, the hidden state that each id was read from, and its scores.
    """
    fed_ids = jnp.where(answer.is_position, tokenizer.position, answer.token_ids)
    fed = model.vlm.embed(fed_ids)
    prompt = model.embeddings(batch)
    length = prompt.shape[1]
    indices = jnp.arange(length, length + fed.shape[1]) + batch.rope_delta[:, None]
    later = jnp.broadcast_to(indices[:, None], (1, 3, fed.shape[1]))
    position_ids = jnp.swapaxes(jnp.concatenate([batch.position_ids, later], axis=2), 0, 1)

    def run(fed: Float[Array, "1 G D"]) -> Float[Array, "1 S+G D"]:
        everything = jnp.concatenate([prompt, fed], axis=1)
        return model.vlm.decoder(everything, position_ids, lengths=batch.lengths + fed.shape[1])[0]

    if model.config.position_input:
        # What is fed at a coordinate follows from the hidden state before it, and so on down the answer.
        def feed(index: Int[Array, ""], fed: Float[Array, "1 G D"]) -> Float[Array, "1 G D"]:
            encoded = position_embedding(model, run(fed)[:, length - 1 + index])
            at = answer.is_position[:, index, None]
            return fed.at[:, index].set(jnp.where(at, encoded.astype(fed.dtype), fed[:, index]))

        fed = jax.lax.fori_loop(0, fed.shape[1], feed, fed)
    hidden = run(fed)
    read_from = hidden[:, length - 1 : -1]
    facts = {} if not isinstance(model.decoder, GridDecoder) else {"cells": _cells(model, read_from[0])}
    return facts | {
        "prompt": prompt,
        "fed": fed,
        "hidden": read_from,
        "logits": model.vlm.decoder.logits(read_from),
        "encoded_again": jax.lax.map(lambda state: position_embedding(model, state[None])[0], read_from[0]),
        "patch_encodings": model.encoder(model.patch_points(batch)),
        "position_ids": later,
    }


def _cells(model: SpaceDrive, hidden: Float[Array, "G D"]) -> Float[Array, "G 3"]:
    """The best cell for each hidden state, metres; one after the other, for a grid has many cells."""

    def cell(hidden: Float[Array, " D"]) -> Float[Array, " 3"]:
        return best_cell(model.decoder.scores(hidden[None], model.encoder), model.decoder.config.grid)[0]

    return jax.lax.map(cell, hidden)


def _prompt_checks(batch: DrivingBatch, facts: dict[str, np.ndarray], expected: Arrays) -> list[Check]:
    token_type_ids = np.asarray(batch.token_type_ids)
    ego = (token_type_ids == TokenType.EGO_FEATURE) | (token_type_ids == TokenType.EGO_POSITION)
    results: dict[str, tuple[Any, dict[str, float]]] = {
        "prompt_ids_after_ego": (batch.token_ids, EQUAL),
        "attention_mask_passed": (
            np.arange(batch.token_ids.shape[1]) < np.asarray(batch.lengths)[:, None],
            EQUAL,
        ),
        "position_ids_prefill": (_axes_first(np.asarray(batch.position_ids), expected), EQUAL),
        "inputs_embeds_prefill": (facts["prompt"], LOGITS),
        "pos_emb": (facts["patch_encodings"], LOGITS),
        "ego_feature": (facts["prompt"][ego][None], {"atol": 2e-4, "rtol": 1e-4}),
    }
    return [
        compare(name, ours, expected[name], **tolerance)
        for name, (ours, tolerance) in results.items()
        if expected.get(name, np.zeros(0)).size
    ]


def _axes_first(position_ids: np.ndarray, expected: Arrays) -> np.ndarray:
    """Positions as recorded: (3, B, S), or (B, S) where a decoder has but one axis."""
    axes = np.swapaxes(position_ids, 0, 1)
    return axes if expected["position_ids_prefill"].ndim == 3 else axes[0]


def _answer_checks(
    case: Case,
    variant: Variant,
    tokenizer: DrivingTokenizer,
    answer: Generation,
    facts: dict[str, np.ndarray],
    expected: Arrays,
    *,
    is_grid: bool,
    has_position_input: bool,
) -> list[Check]:
    count = int(answer.lengths[0])
    ids, decoded, points = (
        np.asarray(values[0, :count])
        for values in (answer.token_ids, answer.is_coordinate, answer.coordinates)
    )
    margins = expected.get("top1_top2_margin", np.full(len(expected["generated_ids"]), np.inf))
    unsure = np.flatnonzero(margins < SURE_MARGIN)
    whole = len(unsure) == 0
    sure = None if whole else int(unsure[0])
    number = int(decoded[:sure].sum())
    hidden = facts["hidden"][0, :count]
    at_coordinates = {
        "hidden_at_pos": (hidden[decoded], LOGITS),
        "coords": (points[decoded], COORDINATES),
        "decoded_pos": (facts["cells"][:count][decoded] if is_grid else None, EQUAL),
        "interpolated_pos": (points[decoded] if is_grid else None, GRID_COORDINATES),
    }
    position = answer.is_position[0, :count]
    replaced, encoded_again = np.where(position, tokenizer.position, ids), facts["encoded_again"][:count]
    prompt = np.asarray(expected["prompt_ids_after_ego"])[0]
    # What went in before each id was read; -1 stands for an encoding instead of a token.
    fed = np.concatenate([prompt[-1:], replaced[:-1]])
    if has_position_input:
        fed = np.where(np.concatenate([[False], position[:-1]]), -1, fed)
    if not variant.arguments.get("io_3d_pos", True):  # nothing of the answer is replaced or encoded then
        replaced, encoded_again = ids, hidden
    results: dict[str, tuple[np.ndarray, dict[str, float], np.ndarray]] = {
        "generated_ids": (ids[:sure], EQUAL, expected["generated_ids"][:sure])
    }
    for name, all_ids in (("generated_ids_after_replacement", replaced), ("fed_token_last", fed)):
        if name in expected:
            results[name] = (all_ids[:sure], EQUAL, expected[name][:sure])
    if "sequences" in expected:
        length = len(prompt) + len(ids[:sure])
        whole_ids = np.concatenate([prompt, ids])
        results["sequences"] = (whole_ids[:length], EQUAL, expected["sequences"].ravel()[:length])
    if whole and "pos_embedding_index" in expected:
        indices = expected["pos_embedding_index"].astype(np.int64)
        results["pos_embedding_index"] = (np.flatnonzero(decoded), EQUAL, indices)
    for name, ours in (
        ("hidden_for_output", hidden),
        ("step_logits", facts["logits"][0, :count]),
        ("reencoded_pe", encoded_again),
    ):
        if name in expected:
            results[name] = (ours[:sure], LOGITS, expected[name][:sure])
    for name, (at, tolerance) in at_coordinates.items():
        if name in expected and at is not None:
            theirs = expected[name].reshape(-1, at.shape[-1])
            # Where the ids were compared to their end, so are the coordinates.
            results[name] = (at, tolerance, theirs) if whole else (at[:number], tolerance, theirs[:number])
    if whole:
        results |= _steps(facts, expected)
    checks = [compare(name, ours, theirs, **bound) for name, (ours, bound, theirs) in results.items()]
    text = variant.facts.get("text")
    if whole and text and tokenizer.vocabulary_size > 0:
        written = answer_text(tokenizer, ids, points, decoded)
        if isinstance(text, list):  # published `io_3d_pos` off: the ids as they are, special ones left out
            text, written = text[0], tokenizer.decode(ids.tolist(), skip_special=True)
        checks.append(compare("text", np.array([written]), np.array([text]), **EQUAL))
    return checks


def _steps(
    facts: dict[str, np.ndarray], expected: Arrays
) -> dict[str, tuple[np.ndarray, dict[str, float], np.ndarray]]:
    """What was fed after the prompt, and where."""
    results = {}
    fed = expected.get("inputs_embeds_steps", np.zeros(0))
    if fed.size:
        results["inputs_embeds_steps"] = (facts["fed"][:, : fed.shape[1]], LOGITS, fed)
    indices = expected.get("position_ids_steps", np.zeros(0))
    if indices.size:
        ours = _axes_first(facts["position_ids"], expected)[..., : indices.shape[-1]]
        results["position_ids_steps"] = (ours, EQUAL, indices)
    return results
