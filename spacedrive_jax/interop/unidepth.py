"""Released UniDepthV2 checkpoints in, and checkpoints of one's own out and in, under the same names."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spacedrive_jax.errors import CheckpointError, DataError, SpaceDriveError
from spacedrive_jax.interop.depth_anything import (
    CONVOLUTION,
    Table,
    export_module,
    load_module,
    patch_embedding_rule,
    position_rules,
)
from spacedrive_jax.interop.safetensors_folder import PlannedTensor, plan_shards, write_folder
from spacedrive_jax.interop.torch_file import open_tensors
from spacedrive_jax.interop.weight_table import Rule, Shape, check_names_and_shapes
from spacedrive_jax.io import MEBIBYTE
from spacedrive_jax.json_files import read_json
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.depth.backbone import SIZES, Dinov2Config
from spacedrive_jax.models.depth.unidepth import NUM_TAPS, UniDepthConfig, UniDepthV2

UNUSED = ("pixel_encoder.mask_token", "pixel_encoder.register_tokens", "pixel_decoder.level_embeds")
"""Tensors of the released files that no output depends on."""
KIND = "unidepth"
"""`kind` in the config.json of a checkpoint written here."""


def unidepth_rules(config: UniDepthConfig) -> tuple[Rule, ...]:
    """The table of a UniDepthV2 checkpoint; one rule per parameter."""
    return (*_encoder_rules(config.encoder), *_camera_rules(config), *_decoder_rules(config))


def load_unidepth(
    path: str | Path, *, config: UniDepthConfig | None = None, compute: ComputeConfig | None = None
) -> UniDepthV2:
    """Builds UniDepthV2 with the weights of a checkpoint.

    Args:
        path: folder with config.json and the weights, or the file of weights (safetensors, .pth or .bin).
        config: architecture; None reads it from config.json, or tells the released sizes apart by width.
        compute: dtypes, rematerialisation, attention kernel.

    Raises:
        CheckpointError: files are missing or damaged, the file is of another architecture (UniDepth V1, or
            the first release of V2), or tensors are missing, unknown or misshapen (all named).
    """
    tensors = open_tensors(path, rename=_canonical)
    shapes = tensors.shapes()
    config = config or read_config(Path(path), shapes)
    _check_architecture(shapes, config, origin=str(path))
    rules = unidepth_rules(config)
    check_names_and_shapes(rules, shapes, origin=str(path), ignore=UNUSED)
    return load_module(lambda rngs: UniDepthV2(config, compute=compute, rngs=rngs), rules, tensors)


def save_unidepth(model: UniDepthV2, path: str | Path) -> None:
    """Writes a checkpoint folder that `load_unidepth` reads, under the released names.

    Raises:
        CheckpointError: the folder exists.
    """
    tensors = export_module(model, unidepth_rules(model.config))
    shards = plan_shards([PlannedTensor(name, value.nbytes) for name, value in tensors.items()], 5 * 1000**3)
    write_folder(path, tensors.items(), shards, config=config_to_json(model.config))


def is_released(path: str | Path) -> bool:
    """Whether a UniDepthV2 checkpoint is one of the released (or in their format), not one written here."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "config.json"
    return not file.is_file() or _kind(file) != KIND


def _kind(file: Path) -> Any:
    content = read_json(file, most=16 * MEBIBYTE)
    return content.get("kind") if isinstance(content, Mapping) else None


def read_config(path: Path, shapes: Mapping[str, Shape]) -> UniDepthConfig:
    """The architecture of a checkpoint: config.json beside it, else one of the released sizes.

    Raises:
        CheckpointError: neither tells.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if file.is_file():
        try:
            return config_from_json(read_json(file, most=16 * MEBIBYTE))
        except DataError:
            raise
        except SpaceDriveError as error:
            raise CheckpointError(f"{file}: {error}") from error
        except KeyError as error:
            raise CheckpointError(f"{file} does not describe a UniDepthV2 model: it lacks {error}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{file} does not describe a UniDepthV2 model: {error!r}") from error
    width = shapes.get("pixel_encoder.cls_token", (0,))[-1]
    for name, size in SIZES.items():
        if size.width == width:
            return UniDepthConfig.named(name)
    raise CheckpointError(
        f"{path}: no config.json, and no released UniDepthV2 has an encoder of width {width}"
    )


def config_from_json(settings: Mapping[str, Any]) -> UniDepthConfig:
    """Reads the released files' config.json, or the one `save_unidepth` writes."""
    if "model" in settings:
        return _released_config(settings)
    encoder, decoder, infer = settings["encoder"], settings["decoder"], settings["infer"]
    default = UniDepthConfig()
    return UniDepthConfig(
        encoder=Dinov2Config(
            patch_size=encoder.get("patch_size", default.encoder.patch_size),
            width=encoder["embed_dim"],
            depth=encoder["depth"],
            heads=encoder["heads"],
            taps=tuple(encoder["output_idx"]),
            position_grid=tuple(encoder["pos_grid"]),
            mlp_ratio=encoder["mlp_ratio"],
            block_norm_eps=encoder["block_norm_eps"],
            final_norm_eps=encoder["final_norm_eps"],
        ),
        width=decoder["hidden_dim"],
        heads=decoder["num_heads"],
        expansion=decoder["expansion"],
        units=tuple(decoder["depths"]),
        head_hidden=decoder.get("head_hidden", default.head_hidden),
        ratio_bounds=tuple(infer["ratio_bounds"]),
        pixel_bounds=(infer["pixels_min"], infer["pixels_max"]),
        resolution_level=infer.get("resolution_level"),
    )


def config_to_json(config: UniDepthConfig) -> dict[str, Any]:
    """Inverse of `config_from_json`."""
    encoder = config.encoder
    return {
        "kind": KIND,
        "encoder": {
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "output_idx": encoder.taps,
            "pos_grid": encoder.position_grid,
            "mlp_ratio": encoder.mlp_ratio,
            "block_norm_eps": encoder.block_norm_eps,
            "final_norm_eps": encoder.final_norm_eps,
        },
        "decoder": {
            "hidden_dim": config.width,
            "num_heads": config.heads,
            "expansion": config.expansion,
            "depths": config.units,
            "head_hidden": config.head_hidden,
        },
        "infer": {
            "ratio_bounds": config.ratio_bounds,
            "pixels_min": config.pixel_bounds[0],
            "pixels_max": config.pixel_bounds[1],
            "resolution_level": config.resolution_level,
        },
    }


def _released_config(settings: Mapping[str, Any]) -> UniDepthConfig:
    model = settings["model"]
    encoder, decoder = model["pixel_encoder"], model["pixel_decoder"]
    name = str(encoder["name"]).removeprefix("dinov2_")
    if model["name"] != "UniDepthV2" or name not in SIZES:
        raise ValueError(f"model {model['name']} with encoder {encoder['name']}")
    limits = _shape_constraints(settings)
    default = UniDepthConfig.named(name)
    return dataclasses.replace(
        default,
        encoder=dataclasses.replace(
            default.encoder, taps=tuple(encoder.get("output_idx", default.encoder.taps))
        ),
        width=decoder["hidden_dim"],
        heads=model["num_heads"],
        expansion=model["expansion"],
        units=tuple(decoder["depths"]),
        ratio_bounds=tuple(limits.get("ratio_bounds", default.ratio_bounds)),
        pixel_bounds=(
            limits.get("pixels_min", default.pixel_bounds[0]),
            limits.get("pixels_max", default.pixel_bounds[1]),
        ),
    )


def _shape_constraints(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The input limits: under `data` in the first releases, under its `augmentations` in the later ones."""
    data = settings.get("data") or {}
    places = (data.get("augmentations") or {}, data, settings)
    found = [place["shape_constraints"] for place in places if place.get("shape_constraints")]
    read = [{name: each.get(name) for name in ("ratio_bounds", "pixels_min", "pixels_max")} for each in found]
    if any(each != read[0] for each in read):
        raise ValueError(f"shape_constraints stand there {len(read)} times, with different values")
    return found[0] if found else {}


def _canonical(name: str) -> str:
    """Drops the wrappers that training leaves in names."""
    return re.sub(r"^(module\.|model\.)+", "", name)


def _check_architecture(shapes: Mapping[str, Shape], config: UniDepthConfig, *, origin: str) -> None:
    ours = any(name.startswith("pixel_decoder.depth_layer.to_depth_lr.") for name in shapes)
    if ours or not any(name.startswith("pixel_encoder.") for name in shapes):
        return
    expected = sum(len(rule.source_names()) for rule in unidepth_rules(config))
    raise CheckpointError(
        f"{origin} holds an older UniDepth architecture (UniDepth V1, or UniDepthV2 as first released: "
        f"{len(shapes)} tensors, where the current UniDepthV2 has {expected + len(UNUSED) - 1} and a "
        "pixel_decoder.depth_layer.to_depth_lr): its network is another one. Download the current UniDepthV2 "
        "checkpoint (vitl14: a file of about 1.415 GB, not 1.453 GB)"
    )


def _encoder_rules(config: Dinov2Config) -> tuple[Rule, ...]:
    width, inner = config.width, config.mlp_ratio * config.width
    whole = Table("pixel_encoder.", ("encoder",))
    block = whole.under("blocks.{layer}", "blocks", layers=config.depth)
    return (
        whole.tensor("cls_token", "class_token", (1, 1, width)),
        *position_rules("pixel_encoder.pos_embed", ("encoder",), config),
        *patch_embedding_rule("pixel_encoder.patch_embed.proj", ("encoder",), config),
        *whole.norm("norm", "final_norm", width),
        *block.norm("norm1", "attention_norm", width),
        *block.kernel("attn.qkv", "qkv", (3 * width, width)),
        *block.kernel("attn.proj", "attention_out", (width, width)),
        block.tensor("ls1.gamma", "attention_scale", (width,)),
        *block.norm("norm2", "mlp_norm", width),
        *block.kernel("mlp.fc1", "mlp_in", (inner, width)),
        *block.kernel("mlp.fc2", "mlp_out", (width, inner)),
        block.tensor("ls2.gamma", "mlp_scale", (width,)),
    )


def _attention_rules(table: Table, width: int, expansion: int, *, layer_scale: bool) -> tuple[Rule, ...]:
    rules = (
        *table.norm("norm_attnx", "query_norm", width),
        *table.norm("norm_attnctx", "context_norm", width),
        *table.kernel("q", "q", (width, width), bias=False),
        *table.kernel("kv", "kv", (2 * width, width), bias=False),
        *table.kernel("out", "out", (width, width), bias=False),
        *_mlp_rules(table.under("mlp", "mlp"), width, expansion * width, width),
    )
    if not layer_scale:
        return rules
    return (
        *rules,
        table.tensor("ls1.gamma", "attention_scale", (width,)),
        table.tensor("ls2.gamma", "mlp_scale", (width,)),
    )


def _mlp_rules(table: Table, width: int, hidden: int, out: int) -> tuple[Rule, ...]:
    return (
        *table.norm("norm", "norm", width),
        *table.kernel("proj1", "inner", (hidden, width)),
        *table.kernel("proj2", "outer", (out, hidden)),
    )


def _camera_rules(config: UniDepthConfig) -> tuple[Rule, ...]:
    width, encoder_width = config.width, config.encoder.width
    decoder = Table("pixel_decoder.", ())
    adapters = [
        rule
        for source, target in (("input", "feature_adapters"), ("camera_token", "token_adapters"))
        for rule in Table(f"pixel_decoder.{source}_adapter.input_adapters.", (), NUM_TAPS).kernel(
            "{layer}", target, (width, encoder_width)
        )
    ]
    head = decoder.under("camera_layer", "camera_head")
    return (
        *adapters,
        head.tensor("latents_pos", "query_position", (1, NUM_TAPS, width)),
        *_mlp_rules(head.under("project", "project"), width, width, width),
        *_attention_rules(head.under("aggregate1", "first"), width, config.expansion, layer_scale=True),
        *_attention_rules(head.under("aggregate2", "second"), width, config.expansion, layer_scale=True),
        *_mlp_rules(head.under("out_pinhole", "out"), width, width, 1),
    )


def _decoder_rules(config: UniDepthConfig) -> tuple[Rule, ...]:
    width = config.width
    channels = (width, width, width // 2, width // 4)
    decoder = Table("pixel_decoder.depth_layer.", ("decoder",))
    prompts = decoder.under("prompt_camera.{layer}.layers.0", "prompts", layers=NUM_TAPS)
    rules = [
        *_attention_rules(prompts, width, config.expansion, layer_scale=False),
        *decoder.kernel("to_latents", "to_latents", (width, width)),
    ]
    for stage, (size, after) in enumerate(itertools.pairwise(channels)):
        kernel = (width, size, 2**stage, 2**stage)
        up = decoder.under(f"ups.{stage}", "stages", stage)
        unit = up.under("convs.{layer}", "units", layers=config.units[stage])
        rules += [
            *decoder.under(f"process_features.{stage}", "inject", stage).transposed(kernel),
            unit.tensor("gamma", "gamma", (1, size, 1, 1)),
            *unit.kernel("conv1", "first", (size, size, 3, 3), CONVOLUTION),
            *unit.kernel("conv2", "second", (size, size, 3, 3), CONVOLUTION),
            *up.kernel("up.0", "out", (after, size, 1, 1), CONVOLUTION),
        ]
    last, hidden = channels[-1], config.head_hidden
    for name, mix in (("depth", "depth_mlp.2"), ("confidence", "confidence_mlp")):
        head = Table("pixel_decoder.depth_layer.", ("decoder", f"{name}_head"))
        rules += [
            *head.norm(f"{mix}.0", "norm", last),
            *head.kernel(f"{mix}.1", "mix", (last, last)),
            *head.kernel(f"to_{name}_lr", "low", (last // 2, last, 3, 3), CONVOLUTION),
            *head.kernel(f"to_{name}_hr.0", "high", (hidden, last // 2, 3, 3), CONVOLUTION),
            *head.kernel(f"to_{name}_hr.2", "out", (1, hidden, 1, 1), CONVOLUTION),
        ]
    return tuple(rules)
