"""Encoders, rotary features, grid search and the variational decoder: kind `coordinate_encoding`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spacedrive_jax.errors import DataError
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive_config import encoder_config as published_encoder
from spacedrive_jax.interop.spacedrive_tensors import vae_rules
from spacedrive_jax.models import coordinate_decoder as grids
from spacedrive_jax.models.coordinate_decoder import VaeDecoder
from spacedrive_jax.models.coordinate_encoder import (
    CoordinateEncoder,
    CoordinateEncoderConfig,
    frequency_table,
    inverse_frequencies,
    rotate_features,
)
from tests.golden.verify.case_files import read_arrays
from tests.golden.verify.check import Check, compare
from tests.golden.verify.modules import read_module
from tests.golden.verify.spacedrive_case import Arrays, Case

ULP = 2.0**-23


def verify_coordinate_encoding(folder: Path) -> list[Check]:
    """Checks whatever of these a folder records."""
    case, expected = Case.open(folder), read_arrays(folder / "outputs.npz")
    settings, inputs = case.settings, case.inputs
    checks: list[Check] = []
    for name, arguments in settings.get("cases", {}).items():
        checks += _encoding(name, arguments, inputs["coords"], expected)
    if "scal" in settings:
        checks += _scale(settings["scal"], inputs, expected)
    for name, rope in settings.items():
        if name.startswith("rope/"):
            width = int(name.split("/")[1])
            features = jnp.asarray(inputs[f"{name}/x"])
            ours = rotate_features(features, jnp.asarray(inputs[f"{name}/coords"]), rope["base"])
            inverse = inverse_frequencies(width, rope["base"])
            checks.append(compare(f"{name}/inv_freq", inverse, expected[f"{name}/inv_freq"], rtol=1e-6))
            checks.append(compare(f"{name}/out", ours, expected[f"{name}/out"], atol=1e-5))
    for name, arguments in settings.items():
        if name.startswith("grid/"):
            checks += _grid(name.split("/")[1], arguments, inputs, expected)
    first_grid = next((name for name in settings if name.startswith("grid/")), None)
    if first_grid is not None:
        checks += _axis(_grid_config(settings[first_grid]), expected)
    if "gumbel" in settings:
        checks += _gumbel(settings["gumbel"], inputs, expected)
    weights = folder / "weights.safetensors"
    for name, arguments in settings.items():
        if name.startswith("vae/"):
            checks += _vae(name, arguments, inputs, expected, SafetensorsFolder(weights))
    return checks


def encoder_config(arguments: Mapping[str, Any]) -> CoordinateEncoderConfig:
    """The encoder of the published encoding class's own arguments, which lack the model's `pe_`."""
    return published_encoder(
        {f"pe_{name}" if name.startswith("freq_") else name: value for name, value in arguments.items()}
    )


def _encoding(name: str, arguments: Mapping[str, Any], points: np.ndarray, expected: Arrays) -> list[Check]:
    """One encoder at one width, unscaled, with its frequency table."""
    width, config = arguments["hidden"], encoder_config({"learnable_pe_scaling": False, **arguments})
    theirs = expected[name]
    table = expected.get(name.replace("pe/", "freq/", 1))
    frequencies = frequency_table(config, width)
    checks = []
    if table is not None:
        # Two roundings apart: torch's vectorised power is not correctly rounded.
        checks.append(compare(name.replace("pe/", "freq/", 1), frequencies, table, rtol=4 * ULP))
    largest = float(np.max(frequencies) * np.max(np.abs(points)))
    ours = CoordinateEncoder(config, width).waves(jnp.asarray(points))
    # The last bit of a frequency moves an angle in proportion: 5e-6 at the 60 rad of the default encoding,
    # 2e-2 at the 2e5 rad of NeRF's.
    bound = max(5e-6, ULP * largest)
    return [*checks, compare(name, ours, theirs, atol=bound, rtol=0.0)]


def _scale(arguments: Mapping[str, Any], inputs: Arrays, expected: Arrays) -> list[Check]:
    """The learnable scale: output and gradients for a given cotangent."""
    encoder = CoordinateEncoder(encoder_config(arguments), arguments["hidden"])
    graph, state = nnx.split(encoder)
    points, cotangent = jnp.asarray(inputs["coords"]), jnp.asarray(inputs["scal/cotangent"])
    ours, pullback = jax.vjp(lambda state, points: nnx.merge(graph, state)(points), state, points)
    gradient, point_gradient = pullback(cotangent)
    alpha = jax.tree.leaves(gradient)[0]
    return [
        compare("scal/out", ours, expected["scal/out"], atol=2e-6),
        compare("scal/grad_scaling", alpha, expected["scal/grad_scaling"]),
        compare("scal/grad_coords", point_gradient, expected["scal/grad_coords"]),
    ]


def best_cell(scores: Float[Array, "... G"], grid: grids.GridConfig) -> Float[Array, "... 3"]:
    """The cell of highest score, metres."""
    best = jnp.argmax(scores, axis=-1)
    x, y = best // grid.cells, best % grid.cells
    axis = jnp.asarray(grids.neighbour_positions(grid)[:, 1])
    return jnp.stack([axis[x], axis[y], jnp.full(x.shape, grid.height)], axis=-1)


def gumbel_cell(
    scores: Float[Array, "... G"], noise: Float[Array, "... G"], grid: grids.GridConfig
) -> Float[Array, "... 3"]:
    """A sampled cell: the highest score plus Gumbel noise, z = 0 (the temperature does not matter here).

    Args:
        scores: similarities.
        noise: standard Gumbel, e.g. `jax.random.gumbel`.
        grid: the cells.
    """
    points = jnp.asarray(grids.grid_points(grid).reshape(-1, 3))
    return points[jnp.argmax(scores + noise, axis=-1)]


def _grid_config(arguments: Mapping[str, Any]) -> grids.GridConfig:
    low, low_y, _, high, high_y, _ = arguments["pc_range"]
    cell, cell_y, _ = arguments["voxel_size"]
    if (low_y, high_y, cell_y) != (low, high, cell):
        raise DataError(f"pc_range {arguments['pc_range']}: the grid must be the same in y as in x")
    return grids.GridConfig(
        minimum=low, cell=cell, cells=round((high - low) / cell), height=arguments["pc_range"][2]
    )


def _grid(name: str, arguments: Mapping[str, Any], inputs: Arrays, expected: Arrays) -> list[Check]:
    """The encoded grid, the hard cell and the averages around it."""
    grid, width = _grid_config(arguments), arguments["hidden"]
    points = grids.grid_points(grid)
    config = encoder_config({"learnable_pe_scaling": False, **arguments})
    # FoNE's grid is recorded without the zeros behind its channels.
    recorded = expected[f"grid/{name}/sub16"]
    width = min(width, recorded.shape[-1])
    table = CoordinateEncoder(config, width)(jnp.asarray(points.reshape(-1, 3)))
    square = np.asarray(table).reshape(*grid.shape, 1, width)
    checks = [
        compare(f"grid/{name}/sub16", square[::16, ::16], recorded, atol=2e-6),
        compare(
            f"grid/{name}/abs_sum", np.abs(square).astype(np.float64).sum(), expected[f"grid/{name}/abs_sum"]
        ),
        compare(f"grid/{name}/shape", np.asarray(square.shape), expected[f"grid/{name}/shape"], rtol=0.0),
    ]
    query = inputs.get(f"dec/{name}/query")
    if query is None:
        return checks
    compare_all = jax.jit(grids.similarities, static_argnames="similarity")
    for similarity, temperature in grids.TEMPERATURE.items():
        scores = compare_all(jnp.asarray(query[..., :width]), table, similarity=similarity)
        # Cosines are divided by 0.001: the last bit of one moves an average by a millimetre.
        loose = 2e-3 if similarity == "cosine" else 1e-3
        near = 2e-3 if similarity == "cosine" else 1e-4
        results = {
            f"{similarity}/decoded": (best_cell(scores, grid), 0.0),
            f"{similarity}/final": (grids.neighbourhood_average(scores, grid, temperature), near),
            f"full_{similarity}": (grids.full_average(scores, grid, temperature), loose),
        }
        if similarity == "cosine":
            results["cosine_T0.05/decoded"] = results["cosine/decoded"]
            results["cosine_T0.05/final"] = (grids.neighbourhood_average(scores, grid, 0.05), 1e-4)
            twice = jnp.concatenate([scores, scores[:, ::-1]])  # recorded for both orders of the queries
            results["full_cosine_B2"] = (grids.full_average(twice, grid, temperature), loose)
        for key, (ours, bound) in results.items():
            if f"dec/{name}/{key}" in expected:
                theirs = expected[f"dec/{name}/{key}"]
                checks.append(compare(f"dec/{name}/{key}", ours, theirs, atol=bound, rtol=0.0))
    return checks


def _axis(grid: grids.GridConfig, expected: Arrays) -> list[Check]:
    """Where the cells lie along an axis, and whose scores the published look-up reads there."""
    checks = []
    if len(expected.get("grid/x_axis", ())) == grid.cells:
        axis = grids.grid_points(grid)[:, 0, 0]
        checks.append(compare("grid/x_axis", axis, expected["grid/x_axis"], atol=1e-5, rtol=0.0))
    for column, which in enumerate(("_minus", "", "_plus")):
        name = f"dec/trunc_index_x{which}"
        if len(expected.get(name, ())) == grid.cells:
            ours = grids.neighbour_indices(grid)[:, column]
            checks.append(compare(name, ours, expected[name], rtol=0.0))
    return checks


def _gumbel(arguments: Mapping[str, Any], inputs: Arrays, expected: Arrays) -> list[Check]:
    """Sampled cells for recorded noise."""
    grid = _grid_config(arguments)
    config = encoder_config({"learnable_pe_scaling": False, **arguments})
    points = jnp.asarray(grids.grid_points(grid).reshape(-1, 3))
    table = CoordinateEncoder(config, arguments["hidden"])(points)
    checks = []
    for similarity in grids.TEMPERATURE:
        key = f"gumbel/{similarity}"
        if f"{key}/decoded" in expected:
            scores = grids.similarities(jnp.asarray(inputs["gumbel/query"]), table, similarity)
            ours = gumbel_cell(scores, jnp.asarray(inputs[f"{key}/noise"]), grid)
            checks.append(compare(f"{key}/decoded", ours, expected[f"{key}/decoded"], atol=1e-5, rtol=0.0))
    return checks


def _vae(
    name: str, arguments: Mapping[str, Any], inputs: Arrays, expected: Arrays, weights: SafetensorsFolder
) -> list[Check]:
    """The variational decoder: samples, divergence and gradients."""
    width, latent, with_current = (arguments[key] for key in ("llm_hidden_dim", "latent_dim", "with_cur"))
    rules = vae_rules(name.replace("/", "_"), width, latent, with_current, target="")
    decoder = read_module(
        lambda: VaeDecoder(width, latent, with_current=with_current, rngs=nnx.Rngs(0)), rules, weights
    )
    arrays = {key: jnp.asarray(inputs[f"{name}/{key}"]) for key in ("pe_embedding", "gt_coords", "noise")}
    hidden, truth, noise = arrays.values()

    def total(decoder: VaeDecoder) -> tuple[jax.Array, dict[str, jax.Array]]:
        future = decoder(hidden, true_coordinates=truth, noise=noise)[..., :2]
        present = decoder(hidden, noise=noise)[..., :2]
        divergence = jnp.mean(decoder.divergence(hidden, truth))
        results = {
            "train/coords": future,
            "eval/coords": present,
            "eval_gt/coords": present,
            "train/loss_vae_gen": divergence,
            "eval_gt/loss_vae_gen": divergence,
        }
        return jnp.sum(future) + divergence, results

    (_, results), gradient = nnx.jit(nnx.value_and_grad(total, has_aux=True))(decoder)
    checks = [
        compare(f"{name}/{key}", ours, expected[f"{name}/{key}"], atol=1e-6)
        for key, ours in results.items()
        if f"{name}/{key}" in expected
    ]
    gradients = dict(nnx.to_flat_state(gradient))
    recorded = {
        "decoder.0.weight": f"{name}/train/grad_decoder0",
        "present_distribution.encoder.conv1.weight": f"{name}/train/grad_present_conv1",
    }
    for rule in rules:
        theirs = expected.get(recorded.get(rule.source.partition(".")[2], ""))
        if theirs is not None:
            key = recorded[rule.source.partition(".")[2]]
            checks.append(compare(key, rule.export(np.asarray(gradients[rule.target][...])), theirs))
    return checks
