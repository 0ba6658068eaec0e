"""The ego status from a record's own past against the published streaming memory: kind `ego_memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.constants import NUM_PAST, STATUS_SIZE
from spacedrive_jax.data.ego_status import ego_status, insert_ego_tokens
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive_config import EGO_STATUS, encoder_config
from spacedrive_jax.interop.spacedrive_tensors import linear_rules
from spacedrive_jax.models.coordinate_encoder import CoordinateEncoder, EgoStatusEncoder
from spacedrive_jax.models.families import llava, qwen2_5_vl
from spacedrive_jax.models.family import ChatTokens
from spacedrive_jax.models.unprojection import patch_centres, pool_depth, unproject
from tests.golden.verify.case_files import read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.ego_frames import memory_checks, record_of_frames
from tests.golden.verify.modules import read_module
from tests.golden.verify.spacedrive_case import Arrays, Case, case_tokenizer

EQUAL = {"atol": 0.0, "rtol": 0.0}
STRIDE = 14
"""Pixels of a patch."""


def verify_ego_memory(folder: Path) -> list[Check]:
    """Every frame of every recorded sequence."""
    case, expected = Case.open(folder), read_arrays(folder / "outputs.npz")
    weights = SafetensorsFolder(folder / "weights.safetensors")
    checks: list[Check] = []
    for name, sequence in case.settings.items():
        if isinstance(sequence, dict) and "timestamps" in sequence:
            checks += _sequence(name, sequence, case, expected, weights)
    return checks


def _sequence(
    name: str, sequence: dict[str, Any], case: Case, expected: Arrays, weights: SafetensorsFolder
) -> list[Check]:
    arguments, width = sequence["args"], sequence["hidden"]
    encoder = CoordinateEncoder(encoder_config(arguments), width)
    encoder.alpha = nnx.Param(jnp.asarray(weights.read(f"{name}.pe_scaling")).reshape(()))
    ego_input = EGO_STATUS[sequence["ego_status"]]
    mlp = _ego_encoder(name, width, weights) if ego_input in ("feature", "both") else None
    numbers = dict(part.split("=") for part in sequence["note"].split()[1:])
    tokenizer = _tokenizer(
        {key: int(value) for key, value in numbers.items()}, case.folder, sequence["lm"] == "llava"
    )
    checks: list[Check] = []
    for frame in range(len(sequence["timestamps"])):
        at = f"{name}/f{frame}"
        inputs = {
            key.removeprefix(f"{at}/"): value
            for key, value in case.inputs.items()
            if key.startswith(f"{at}/")
        }
        states = [
            ego_status(_record(case.inputs, name, frame, row), "released") for row in range(sequence["B"])
        ]
        checks += memory_checks(f"{at}/", np.stack([state.status for state in states]), expected)
        checks += _tokens(at, inputs, tokenizer, ego_input, expected)
        features = []
        if mlp is not None:
            features.append(mlp(jnp.asarray(np.stack([state.status for state in states])))[:, None])
        if ego_input in ("positions", "both"):
            features.append(encoder.past(jnp.asarray(np.stack([state.past_positions for state in states]))))
        # Frame 5 of a sequence may jump hundreds of metres: the encoding of such a point is that much looser.
        farthest = max(float(np.abs(state.past_positions).max()) for state in states)
        bound = 2e-3 if farthest > 100 else 2e-4
        results = {
            "ego_feature": (jnp.concatenate(features, axis=1), {"atol": bound}),
            "pos_emb": (encoder(_points(inputs, sequence)), {"atol": 5e-5}),
        }
        for key, (ours, tolerance) in results.items():
            if f"{at}/{key}" in expected:
                checks.append(compare(f"{at}/{key}", ours, expected[f"{at}/{key}"], **tolerance))
        coordinates = inputs["coords_pos"].reshape(-1, 2)
        if f"{at}/io_coords_pos" in expected:
            ours = encoder(jnp.asarray(np.pad(coordinates, ((0, 0), (0, 1)))))[None]
            checks.append(compare(f"{at}/io_coords_pos", ours, expected[f"{at}/io_coords_pos"], atol=2e-6))
        if f"{at}/gt_coords_xy" in expected:
            theirs = expected[f"{at}/gt_coords_xy"]
            checks.append(compare(f"{at}/gt_coords_xy", coordinates.reshape(theirs.shape), theirs, **EQUAL))
    return checks


def _record(inputs: Arrays, name: str, frame: int, row: int) -> dict[str, Any]:
    """The record of a frame: itself and what came before it."""
    first = max(frame - NUM_PAST, 0)
    keys = ("timestamp", "ego_pose", "command", "can_bus")
    frames = [
        {key: inputs[f"{name}/f{index}/{key}"][row] for key in keys} for index in range(frame, first - 1, -1)
    ]
    return record_of_frames(frames, from_start=first == 0)


def _tokens(
    at: str,
    inputs: Arrays,
    tokenizer: DrivingTokenizer,
    ego_input: Any,
    expected: Arrays,
) -> list[Check]:
    """Ids, labels and mask after the ego tokens are in, padding included."""
    if f"{at}/input_ids" not in expected:
        return []
    theirs = {key: expected[f"{at}/{key}"] for key in ("input_ids", "labels", "attention_mask")}
    ours = {key: np.zeros_like(value) for key, value in theirs.items()}
    for row, length in enumerate(inputs["lengths"]):
        ids, labels = (inputs[key][row, :length].tolist() for key in ("input_ids_padded", "labels_padded"))
        chat, _ = insert_ego_tokens(tokenizer, ChatTokens(ids, labels, []), ego_input)
        count = len(chat.token_ids)
        ours["input_ids"][row, :count] = chat.token_ids
        ours["labels"][row, :count] = chat.labels
        ours["attention_mask"][row, :count] = 1
        for key in ("input_ids", "labels"):
            ours[key][row, count:] = theirs[key][row, count:]  # what pads is the loader's
    return [compare(f"{at}/{key}", ours[key], theirs[key], **EQUAL) for key in theirs]


def _points(inputs: Arrays, sequence: dict[str, Any]) -> jnp.ndarray:
    merge = 1 if sequence["lm"] == "llava" else 2
    grid = (sequence["grid"][0] // merge, sequence["grid"][1] // merge)
    centres = jnp.asarray(patch_centres(grid, STRIDE * merge))
    depth = pool_depth(jnp.asarray(inputs["depth"]), grid)
    return unproject(depth, centres, jnp.asarray(inputs["lidar2img"])).reshape(sequence["B"], -1, 3)


def _ego_encoder(name: str, width: int, weights: SafetensorsFolder) -> EgoStatusEncoder:
    rules = [
        *linear_rules(f"{name}.ego_status_mlp.0", "hidden", STATUS_SIZE, width),
        *linear_rules(f"{name}.ego_status_mlp.2", "output", width, width),
    ]
    return read_module(lambda: EgoStatusEncoder(STATUS_SIZE, width, rngs=nnx.Rngs(0)), rules, weights)


def _tokenizer(ids: dict[str, int], folder: Path, is_llava: bool) -> DrivingTokenizer:
    """The special ids that the sequence's note names; the rest does not matter here."""
    names = {
        "vision_end": "vision_end",
        "image_pad": "image_pad",
        "pos_indicator": "indicator",
        "pos_embedding": "embedding",
        "pad": "pad",
    }
    known = {key: ids[name] for key, name in names.items()}
    chat = (llava if is_llava else qwen2_5_vl).FAMILY.chat
    return case_tokenizer({"im_start": -1, "im_end": -1, "vision_start": -1, **known}, folder, chat)
