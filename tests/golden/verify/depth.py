"""Checks UniDepthV2 against recorded numbers of the published code: `kind` unidepth.

Recorded arrays are in PyTorch's layouts (channels first). A case folder may hold any part of the arrays; what
is recorded is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.errors import DataError
from spacedrive_jax.interop.unidepth import load_unidepth
from spacedrive_jax.models.depth.backbone import Dinov2, Dinov2Block
from spacedrive_jax.models.depth.unidepth import (
    UniDepthInference,
    UniDepthV2,
    intrinsic_matrix,
    pixel_rays,
    ray_angles,
    ray_embedding,
    to_network,
)
from spacedrive_jax.models.depth.unidepth_decoder import camera_parameters
from spacedrive_jax.models.layers import scan_layers
from spacedrive_jax.models.unprojection import pool_depth
from tests.golden.verify.case_files import Recorded, read_arrays, read_settings, watched
from tests.golden.verify.check import Check, compare

Arrays = dict[str, Any]

STEPS = ("enc.tokens", "enc.pos", "enc.patch", "enc.block", "cam.project", "cam.aggregate", "dec.")
STEPS += ("depth.conditioned", "depth.process", "depth.up", "depth.depth", "depth.confidence", "depth.to_")
"""How the names of arrays inside blocks begin."""
STRIDE = 8
"""Large arrays are recorded at every eighth pixel from this offset on."""
OFFSET = 3


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds for one case; depth and its like entry by entry, as a difference of logarithms."""

    ratio: float = 2e-4
    angle: float = 2e-5
    embedding: float = 1e-3
    feature: float = 5e-5
    logit: float = 2e-4


def verify_unidepth(folder: Path) -> list[Check]:
    """Compares every recorded output and intermediate of every case.

    Raises:
        DataError: weights or inputs are missing.
    """
    settings = read_settings(folder)
    inputs = _load(folder, "inputs")
    if not inputs:
        raise DataError(f"{folder} has no inputs*.npz")
    outputs = _load(folder, "outputs")
    model = load_unidepth(folder if (folder / "model.safetensors.index.json").is_file() else _single(folder))
    checks: list[Check] = []
    for case, facts in settings["cases"].items():
        if f"{case}.rgb" not in inputs:
            continue
        expected = {
            key.removeprefix(f"{case}."): outputs[key]
            for key in outputs
            if key.startswith(f"{case}.") and "." not in key.removeprefix(f"{case}.")
        }
        expected |= _load(folder, f"intermediates_{case}", exact=True)
        large = max(facts["model_hw"]) > 400
        tolerance = Tolerance(5e-4, 5e-5, 4e-3, logit=5e-4) if large else Tolerance()
        actual = run_case(
            model,
            inputs[f"{case}.rgb"].transpose(0, 2, 3, 1),
            inputs.get(f"{case}.K"),
            (facts["pixel_bounds"][0], facts["pixel_bounds"][1]),
            every_step=any(name.startswith(STEPS) for name in expected),
        )
        checks += [
            _check(f"{case}.{name}", recorded_part(actual, name), value, tolerance)
            for name, value in sorted(expected.items())
        ]
    return checks


def run_case(
    model: UniDepthV2,
    images: np.ndarray,
    intrinsics: np.ndarray | None,
    pixel_bounds: tuple[float, float],
    *,
    every_step: bool,
) -> Arrays:
    """Outputs and intermediates by their recorded names, in PyTorch's layouts.

    Args:
        model: with the case's weights.
        images: (B, H, W, 3) uint8.
        intrinsics: (B or 1, 3, 3), pixels of the images, or None.
        pixel_bounds: of the network's input.
        every_step: also the arrays of every block (else XLA has less to keep).
    """
    config = dataclasses.replace(model.config, pixel_bounds=pixel_bounds)
    graph, state = nnx.split(model)
    if intrinsics is not None:
        intrinsics = np.broadcast_to(intrinsics, (len(images), 3, 3))

    @jax.jit
    def run(state: nnx.State, images: Any, intrinsics: Any) -> tuple[UniDepthInference, Arrays]:
        model = nnx.merge(graph, state)
        model.config = config
        return model.infer(images, intrinsics), _intermediates(model, images, intrinsics, every_step)

    with jax.default_matmul_precision("highest"):
        inferred, arrays = jax.device_get(run(state, images, intrinsics))
    arrays |= {
        "depth": inferred.depth[:, None],
        "confidence": inferred.confidence[:, None],
        "radius": inferred.radius[:, None],
        "intrinsics": inferred.intrinsics,
        "points": _first(inferred.points),
        "rays": _first(inferred.rays),
        "out.depth_features": _first(inferred.latents),
        "decoder_out.depth_features": _first(inferred.latents),
    }
    return arrays


def recorded_part(arrays: Arrays, name: str) -> Any:
    """Our counterpart of a recorded array; suffixes of the name say which part was recorded.

    Raises:
        DataError: the name is not known.
    """
    parts: Mapping[str, Callable[[Any], Any]] = {
        "_image0": lambda array: array[:1],
        "_stride8": lambda array: array[:, :, OFFSET::STRIDE, OFFSET::STRIDE],
        "_minpool_grid": lambda array: pool_depth(array[:, 0], tuple(arrays["grid"])),
    }
    for suffix, take in parts.items():
        if name.endswith(suffix):
            return take(recorded_part(arrays, name.removesuffix(suffix)))
    if name not in arrays:
        raise DataError(f"nothing here corresponds to the recorded array {name}")
    return arrays[name]


def _intermediates(model: UniDepthV2, images: jax.Array, intrinsics: Any, every_step: bool) -> Arrays:
    """The network again, step by step, from its own parts."""
    size = model.config.inference_size((images.shape[1], images.shape[2]))
    prepared = model.prepare(images, size)
    encoder, decoder, head = model.encoder, model.decoder, model.camera_head
    grid = encoder.grid(*size.network)
    tokens = encoder.embed(prepared)
    features, class_tokens = encoder(prepared)
    adapted = model.adapt(model.feature_adapters, features)
    adapted_tokens = model.adapt(model.token_adapters, class_tokens)
    projected = head.project(adapted_tokens.swapaxes(0, 1))
    position = head.query_position[...]
    first = head.first(projected, projected, position)
    second = head.second(first, first, position)
    raw = head(adapted_tokens.swapaxes(0, 1))
    predicted = camera_parameters(raw, size.network)
    camera = predicted if intrinsics is None else to_network(intrinsics, size)
    rays = pixel_rays(camera, size.network)
    angles = ray_angles(rays, grid)
    embedding = ray_embedding(angles, grid, model.config.width)
    output = model.network(prepared, None if intrinsics is None else camera)
    arrays: Arrays = {
        "grid": np.asarray(grid),
        "enc.input_image": _first(prepared),
        "cam.raw4": raw[..., None],
        "cam.intrinsics4": predicted,
        "depth.ray_angles": angles,
        "depth.ray_embedding": embedding,
        "depth.logdepth_raw": output.log_radius[:, None],
        "depth.logconf_raw": output.log_confidence[:, None],
        "depth.to_latents": _flat(output.latents),
        "decoder_out.intrinsics": intrinsic_matrix(predicted),
        "decoder_out.rays": _flat(rays),
        "decoder_out.radius": output.radius[:, None],
        "decoder_out.confidence": output.confidence[:, None],
    }
    for tap in range(len(features)):
        arrays[f"enc.feature.{tap}"] = features[tap]
        arrays[f"enc.cls.{tap}"] = class_tokens[tap][:, None]
    if not every_step:
        return arrays
    class_position = encoder.class_position[...][None]
    positions = jnp.concatenate([class_position, encoder.resized_positions(grid)])[None]
    arrays |= {
        "enc.tokens_in": tokens,
        "enc.pos_embed_interp": positions,
        "enc.patch_embed": (tokens - positions)[:, 1:],
        "cam.project": projected,
        "cam.aggregate1": first,
        "cam.aggregate2": second,
    }
    for index, block in enumerate(_every_block(encoder, tokens)):
        arrays[f"enc.block_out.{index}"] = block
    conditioned = decoder.condition(adapted, embedding)
    for tap in range(len(features)):
        arrays[f"dec.adapted_feature.{tap}"] = adapted[tap]
        arrays[f"dec.adapted_cls.{tap}"] = adapted_tokens[tap][:, None]
        arrays[f"depth.conditioned.{tap}"] = _flat(conditioned[tap])
    x = decoder.to_latents(conditioned[0])
    for index, (stage, inject) in enumerate(zip(decoder.stages, decoder.inject, strict=True)):
        injected = inject(conditioned[index + 1])
        x = stage(x + injected)
        arrays[f"depth.process_features.{index}"] = _first(injected)
        arrays[f"depth.up.{index}"] = _first(x)
    for name, output_head in (("depth", decoder.depth_head), ("confidence", decoder.confidence_head)):
        mixed = output_head.mix(output_head.norm(x))
        arrays[f"depth.{name}_mlp"] = mixed
        arrays[f"depth.to_{name}_lr"] = _first(output_head.low(mixed))
    return arrays


def _every_block(encoder: Dinov2, tokens: jax.Array) -> jax.Array:
    """The output of every block, tapped or not, (L, B, P, D)."""

    def apply(block: Dinov2Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = block(x)
        return x, x

    return scan_layers(encoder.blocks, apply, tokens, None, encoder.compute)[1]


def _check(name: str, actual: Any, expected: np.ndarray, tolerance: Tolerance) -> Check:
    last = name.rsplit(".", 1)[-1]
    if "ray" in last and len(expected) == 1:
        actual = np.asarray(actual)[:1]  # recorded once for the camera that all images share
    if last.startswith(("depth_features", "to_depth", "depth_mlp")):
        return compare(name, actual, expected, atol=tolerance.feature, rtol=tolerance.feature)
    if last.split("_")[0] in ("depth", "radius", "confidence") and last != "confidence_mlp":
        return compare(f"log {name}", np.log(actual), np.log(expected), atol=tolerance.ratio, rtol=0)
    if "log" in last:
        return compare(name, actual, expected, atol=tolerance.logit, rtol=0)
    if "ray_angles" in last:
        return compare(name, actual, expected, atol=tolerance.angle, rtol=0)
    if "ray_embedding" in last:
        return compare(name, actual, expected, atol=tolerance.embedding, rtol=0)
    if last in ("points", "intrinsics", "intrinsics4"):
        return compare(name, actual, expected, rtol=tolerance.ratio)
    return compare(name, actual, expected, atol=tolerance.feature, rtol=tolerance.feature)


def _load(folder: Path, stem: str, *, exact: bool = False) -> Recorded:
    arrays = Recorded(f"{folder}/{stem}*.npz")
    for file in sorted(folder.glob(f"{stem}.npz" if exact else f"{stem}*.npz")):
        part = read_arrays(file)
        part.asked |= part.keys()  # from here on, the arrays of all files are asked for together
        arrays.update(part)
    return watched(arrays) if stem.startswith("outputs") else arrays


def _single(folder: Path) -> Path:
    file = folder / "weights.safetensors"
    if not file.is_file():
        raise DataError(f"{folder} has neither weights.safetensors nor a sharded checkpoint")
    return file


def _first(array: Any) -> Any:
    """Channels first."""
    return array.transpose(0, 3, 1, 2)


def _flat(array: Any) -> Any:
    """Rows and columns as one axis."""
    return array.reshape(array.shape[0], -1, array.shape[-1])
