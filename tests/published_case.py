"""A golden case of the published SpaceDrive+ (Qwen) as this project's model and batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spacedrive_jax.batch import DrivingBatch, stack
from spacedrive_jax.config import ModelConfig
from spacedrive_jax.data.chat import IGNORE, ChatTokens
from spacedrive_jax.data.ego_status import ego_status
from spacedrive_jax.data.samples import token_fields
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.geometry.patch_depth import pool_depth
from spacedrive_jax.model import SpaceDrive
from spacedrive_jax.vlm import LoraConfig, NewTokensConfig, read_hf_config
from spacedrive_jax.vlm.checkpoint import fill
from spacedrive_jax.vlm.conversion import lora_rules, new_token_rules
from spacedrive_jax.vlm.qwen_conversion import qwen_rules
from spacedrive_jax.vlm.safetensors_folder import SafetensorsFolder

GOLDEN = Path(__file__).parent / "golden"
HEADS = {
    "decoder.hidden": "mlp_output_coords.0",
    "decoder.output": "mlp_output_coords.2",
    "ego_encoder.hidden": "ego_status_mlp.0",
    "ego_encoder.output": "ego_status_mlp.2",
}


@dataclasses.dataclass(frozen=True)
class PublishedCase:
    model: SpaceDrive
    batch: DrivingBatch
    tokenizer: DrivingTokenizer
    outputs: dict[str, np.ndarray]
    settings: dict


def load_case(name: str) -> PublishedCase:
    folder = GOLDEN / name
    settings = json.loads((folder / "config.json").read_text())
    inputs = dict(np.load(folder / "inputs.npz"))
    tokenizer = load_tokenizer(GOLDEN / "prompts" / "tokenizer.json")
    vlm = read_hf_config(settings["vlm_config"])
    config = ModelConfig(
        vlm=vlm, lora=LoraConfig(rank=settings["lora"]["r"], alpha=settings["lora"]["alpha"])
    )
    model = nnx.jit(lambda: SpaceDrive(config, indicator_id=tokenizer.indicator, rngs=nnx.Rngs(0)))()
    load_weights(model, folder / "weights.safetensors")
    batch = published_batch(inputs, tokenizer, settings["grid"], vlm.vision.merge_size)
    return PublishedCase(model, batch, tokenizer, dict(np.load(folder / "outputs.npz")), settings)


def load_weights(model: SpaceDrive, path: Path) -> None:
    weights = SafetensorsFolder(path)
    config = model.config
    _, state = nnx.split(model.vlm)
    flat = dict(nnx.to_flat_state(state))
    rules = (
        *qwen_rules(config.vlm),
        *lora_rules(config.vlm.decoder, config.lora),
        *new_token_rules(config.vlm.decoder, NewTokensConfig(first_id=510)),
    )
    fill(flat, rules, weights)
    nnx.update(model.vlm, nnx.from_flat_state(flat))
    for target, source in HEADS.items():
        module, layer = target.split(".")
        linear = getattr(getattr(model, module), layer)
        linear.kernel[...] = jnp.asarray(weights.read(f"{source}.weight").T)
        linear.bias[...] = jnp.asarray(weights.read(f"{source}.bias"))
    model.encoder.alpha[...] = jnp.asarray(weights.read("pe_scaling")).reshape(())


def published_batch(
    inputs: dict[str, np.ndarray], tokenizer: DrivingTokenizer, patch_grid: list[int], merge: int
) -> DrivingBatch:
    """The second frame of a two-frame case: the first fills the ego memory."""
    ids = (inputs["f1/input_ids/0"] if "f1/input_ids/0" in inputs else inputs["f1/input_ids"][0]).tolist()
    labels = inputs["f1/labels/0"].tolist() if "f1/labels/0" in inputs else [IGNORE] * len(ids)
    labels = [IGNORE if label == tokenizer.position else label for label in labels]
    starts = [index + 1 for index, token in enumerate(ids) if token == tokenizer.vision_start]
    grid = (patch_grid[0] // merge, patch_grid[1] // merge)
    fields = token_fields(
        tokenizer, ChatTokens(ids, labels, starts), grid, "both", sequence_length=300, max_targets=96
    )
    intrinsics = inputs["f1/data/intrinsics"][0][:, :3, :3].astype(np.float64)
    homogeneous = np.tile(np.eye(4), (6, 1, 1))
    homogeneous[:, :3, :3] = intrinsics
    camera_to_ego = np.linalg.inv(np.linalg.inv(homogeneous) @ inputs["f1/data/lidar2img"][0])
    status = ego_status(published_record(inputs), "released")
    waypoints = inputs["f1/coords_pos/0"][:6] if "f1/coords_pos/0" in inputs else np.zeros((6, 2))
    sample = DrivingBatch(
        **fields,
        pixel_values=inputs["f1/pixel_values"][0].reshape(6, patch_grid[0] * patch_grid[1], -1),
        patch_depth=pool_depth(inputs["f1/depth"][0], grid),
        intrinsics=intrinsics.astype(np.float32),
        camera_to_ego=camera_to_ego.astype(np.float32),
        ego_status=status.status,
        past_positions=status.past_positions,
        coordinates=np.zeros((6, 3), np.float32),
        waypoints=waypoints.astype(np.float32),
        index=np.int32(0),
    )
    return jax.tree.map(jnp.asarray, stack([sample]))


def published_record(inputs: dict[str, np.ndarray]) -> dict:
    """The fields of a record that the ego status reads, from the two frames of a case."""
    now, before = ({k[8:]: inputs[k][0] for k in inputs if k.startswith(f"f{t}/data")} for t in (1, 0))
    past = np.zeros((2, 4, 4))
    past[0] = np.linalg.inv(now["ego_pose"].astype(np.float64)) @ before["ego_pose"]
    stamp = round(float(now["timestamp"]) * 1e6)
    return {
        "timestamp_us": stamp,
        "past_timestamp_us": [round(float(before["timestamp"]) * 1e6), 0],
        "past_mask": np.array([True, False]),
        "past_to_ego": past,
        "can_bus": now["can_bus"],
        "past_can_bus": np.stack([before["can_bus"], np.zeros(13)]),
        "command_released": now["command"],
        "past_command_released": np.array([before["command"], 0]),
    }
