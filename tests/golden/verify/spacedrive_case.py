"""A recorded case of the published SpaceDrive as this project's model and batch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import BPE

from spacedrive_jax.batch import DrivingBatch, stack
from spacedrive_jax.config import TrainConfig
from spacedrive_jax.constants import NUM_PAST, NUM_WAYPOINTS, STATUS_SIZE
from spacedrive_jax.data.ego_status import EgoStatus, ego_status
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.data.transforms import token_fields
from spacedrive_jax.errors import DataError
from spacedrive_jax.interop.hf_checkpoint import fill
from spacedrive_jax.interop.hf_config import read_hf_config
from spacedrive_jax.interop.safetensors_folder import SafetensorsFolder
from spacedrive_jax.interop.spacedrive_config import model_config, train_config
from spacedrive_jax.interop.spacedrive_tensors import adapter_rules, base_rules, head_rules, new_row_rules
from spacedrive_jax.interop.weight_table import Rule, check_names_and_shapes
from spacedrive_jax.models.config import ComputeConfig, LoraConfig
from spacedrive_jax.models.families import family_of, llava, qwen2_5_vl
from spacedrive_jax.models.families.llava import LlavaConfig
from spacedrive_jax.models.family import IGNORE, ChatTemplate, ChatTokens
from spacedrive_jax.models.image_processor import flatten_patches
from spacedrive_jax.models.spacedrive import SpaceDrive, new_token_rows
from spacedrive_jax.models.spacedrive_config import ModelConfig
from spacedrive_jax.models.unprojection import pool_depth
from tests.golden.verify.case_files import Recorded, read_arrays, read_settings
from tests.golden.verify.ego_frames import record_of_frames

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder's settings and inputs."""

    folder: Path
    settings: Recorded
    inputs: Recorded

    @classmethod
    def open(cls, folder: Path) -> Case:
        """Reads config.json and inputs.npz.

        Raises:
            DataError: a file is missing or damaged.
        """
        return cls(folder, read_settings(folder), read_arrays(folder / "inputs.npz"))

    @property
    def is_llava(self) -> bool:
        """LLaVA-1.5 or Qwen2.5-VL."""
        return self.settings["vlm_config"]["model_type"] == "llava"

    @property
    def frames(self) -> list[int]:
        """Numbers of the frames, in the order they were run.

        Raises:
            DataError: there is none.
        """
        found = (re.match(r"f(\d+)/data/", name) for name in self.inputs)
        numbers = sorted({int(match[1]) for match in found if match})
        if not numbers:
            raise DataError(f"{self.inputs.origin} has no frame (arrays f0/data/... and so on)")
        return numbers

    @property
    def frame(self) -> int:
        """The last frame: the outputs are its; those before fill the ego memory."""
        return self.frames[-1]

    def lora(self) -> LoraConfig:
        """The adapters."""
        settings = self.settings["lora"]
        if self.is_llava:
            return llava.FAMILY.lora(settings["r"])
        return LoraConfig(rank=settings["r"], alpha=settings["alpha"])

    def tokenizer(self) -> DrivingTokenizer:
        """The special ids, and the words where the case or the `prompts` case beside it has them."""
        chat = (llava if self.is_llava else qwen2_5_vl).FAMILY.chat
        return case_tokenizer(self.settings["token_ids"], self.folder, chat)

    def choices(self, arguments: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        """The config that the published constructor's arguments stand for, in float32."""
        vlm = read_hf_config(self.settings["vlm_config"])
        return model_config(arguments, vlm, self.lora(), ComputeConfig()), train_config(arguments)


def case_tokenizer(ids: Mapping[str, int], folder: Path, chat: ChatTemplate) -> DrivingTokenizer:
    """Special ids as a case names them, with the words of tokenizer.json beside it or in `../prompts`."""
    files = [folder / "tokenizer.json", folder.parent / "prompts" / "tokenizer.json"]
    file = next((file for file in files if file.is_file()), None)
    return DrivingTokenizer(
        tokenizer=Tokenizer(BPE()) if file is None else load_tokenizer(file).tokenizer,
        chat=chat,
        special={
            "turn_start": ids["im_start"],
            "turn_end": ids["im_end"],
            "vision_start": ids["vision_start"],
            "vision_end": ids["vision_end"],
            "image": ids["image_pad"],
            "padding": ids["pad"],
        },
        indicator=ids["pos_indicator"],
        position=ids["pos_embedding"],
    )


class Weights:
    """Several safetensors files as one; later files go before earlier ones."""

    def __init__(self, files: list[Path]) -> None:
        # LLaVA's names lost a part with transformers 5; Qwen's are the table's already.
        self.files = [
            SafetensorsFolder(file, rename=lambda name: name.replace(".vision_model.", ".")) for file in files
        ]

    def read(self, name: str) -> np.ndarray:
        """One tensor by its published name."""
        for file in reversed(self.files):
            if name in file.places:
                return file.read(name)
        raise DataError(f"{self.files[0].path} lacks {name}: the case is incomplete")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        return {name: shape for file in self.files for name, shape in file.shapes().items()}


def build_model(config: ModelConfig, indicator_id: int, weights: Weights) -> SpaceDrive:
    """The model with recorded weights.

    Raises:
        DataError: naming every tensor that is missing or has another shape than the settings ask for.
    """

    def build() -> SpaceDrive:
        return SpaceDrive(config, indicator_id=indicator_id, rngs=nnx.Rngs(0))

    # Abstract: every parameter is recorded, and drawing them would cost more than all that is compared.
    graph, abstract = nnx.split(nnx.eval_shape(build))
    state = dict(nnx.to_flat_state(abstract))
    rules = model_rules(config, indicator_id)
    names = {name for rule in rules for name in rule.source_names()}
    shapes = {name: shape for name, shape in weights.shapes().items() if name in names}
    check_names_and_shapes(rules, shapes, origin=str(weights.files[-1].path))
    fill(state, rules, weights)
    new_tokens = new_token_rows(config, indicator_id)
    if new_tokens is not None and isinstance(config.vlm, LlavaConfig):
        # The published LLaVA trains rows of its full tables; ours are kept beside them.
        rows = slice(new_tokens.first_id, new_tokens.first_id + new_tokens.count)
        for new, table in (("new_embedding", "embedding"), ("new_head", "head")):
            variable = state["vlm", "decoder", new]
            state["vlm", "decoder", new] = variable.replace(state["vlm", "decoder", table][...][rows])
    return nnx.merge(graph, nnx.from_flat_state(state))


def model_rules(config: ModelConfig, indicator_id: int) -> tuple[Rule, ...]:
    """The table of all recorded tensors."""
    return (*base_rules(config), *trainable_rules(config, indicator_id))


def trainable_rules(config: ModelConfig, indicator_id: int) -> tuple[Rule, ...]:
    """The table of what the published code trains (LLaVA's two rows excepted)."""
    new_tokens = None if isinstance(config.vlm, LlavaConfig) else new_token_rows(config, indicator_id)
    return (
        *adapter_rules(config),
        *new_row_rules(config, new_tokens),
        *head_rules(config, alpha_shape=(1,)),
    )


def build_batch(
    case: Case,
    config: ModelConfig,
    *,
    texts: Arrays | None = None,
    supervise_positions: bool = False,
    has_future: bool | None = None,
    sequence_length: int = 0,
    max_targets: int = 0,
) -> DrivingBatch:
    """The last frame of a case.

    Args:
        case: the case.
        config: which ego tokens to lay out, and the vision tower's sizes.
        texts: `input_ids/{b}`, `labels/{b}`, `coords_pos/{b}` instead of the last frame's own.
        supervise_positions: keep the labels at position tokens (published `supervise_semantic_posemb`).
        has_future: overrides what the case says of complete futures.
        sequence_length: at least this S; as long as the longest conversation otherwise.
        max_targets: at least this M.
    """
    inputs, tokenizer, at = case.inputs, case.tokenizer(), f"f{case.frame}"
    texts = texts or {
        name.removeprefix(f"{at}/"): value for name, value in inputs.items() if name.startswith(f"{at}/")
    }
    size = len(inputs[f"{at}/data/timestamp"])
    conversations = [_conversation(case, texts, row, supervise_positions) for row in range(size)]
    merge = config.vlm.vision.merge_size
    patch_rows, patch_columns = case.settings["grid"]
    grid = (patch_rows // merge, patch_columns // merge)
    pixels = inputs[f"{at}/pixel_values"]
    if case.is_llava:
        pixels = np.asarray(flatten_patches(pixels, config.vlm.vision.patch_size))
    pixels = pixels.reshape(size, -1, patch_rows * patch_columns, pixels.shape[-1])
    longest = max(len(chat.token_ids) for chat in conversations) + _inserted(config)
    targets = max(int(np.sum(np.asarray(chat.labels) != IGNORE)) for chat in conversations)
    points = [
        texts.get(f"coords_pos/{row}", texts.get("coords_pos", np.zeros((0, 2)))) for row in range(size)
    ]
    most = max(NUM_WAYPOINTS, *map(len, points))
    samples = []
    for row, chat in enumerate(conversations):
        fields = token_fields(
            family_of(config.vlm),
            tokenizer,
            chat,
            grid,
            config.ego_status,
            sequence_length=max(longest, sequence_length),
            max_targets=max(targets, max_targets, 1),
        )
        future = inputs.get(f"{at}/data/has_gt_planning", np.ones(size, bool))[row]
        future = future if has_future is None else has_future
        fields["waypoint_mask"] = fields["waypoint_mask"] & bool(future)
        intrinsics, camera_to_ego = _cameras(inputs, at, row)
        if config.ego_status == "none":  # such cases need not record a past
            status = EgoStatus(np.zeros(STATUS_SIZE, np.float32), np.zeros((NUM_PAST, 3), np.float32))
        else:
            status = ego_status(record_of(case, row), "released")
        coordinates = np.zeros((most, 3), np.float32)
        coordinates[: len(points[row]), :2] = points[row]
        samples.append(
            DrivingBatch(
                **fields,
                pixel_values=pixels[row].astype(np.float32),
                patch_depth=pool_depth(inputs[f"{at}/depth"][row], grid),
                intrinsics=intrinsics,
                camera_to_ego=camera_to_ego,
                ego_status=status.status,
                past_positions=status.past_positions,
                coordinates=coordinates,
                waypoints=coordinates[:NUM_WAYPOINTS, :2],
                index=np.int32(row),
            )
        )
    return jax.tree.map(jnp.asarray, stack(samples))


def _conversation(case: Case, texts: Arrays, row: int, supervise_positions: bool) -> ChatTokens:
    tokenizer = case.tokenizer()
    ids = texts[f"input_ids/{row}"] if f"input_ids/{row}" in texts else texts["input_ids"].reshape(-1)
    found = texts.get(f"labels/{row}", texts.get("labels"))
    labels = np.full(len(ids), IGNORE) if found is None else found.reshape(-1).copy()
    if not supervise_positions:
        labels[labels == tokenizer.position] = IGNORE
    if case.is_llava:
        images = np.flatnonzero(ids == tokenizer.image)
        starts = images[:: case.settings["grid"][0] * case.settings["grid"][1]]
    else:
        starts = np.flatnonzero(ids == tokenizer.special["vision_start"]) + 1
    return ChatTokens(ids.tolist(), labels.tolist(), starts.tolist())


def _inserted(config: ModelConfig) -> int:
    feature = (1 if isinstance(config.vlm, LlavaConfig) else 3) * (config.ego_status in ("feature", "both"))
    return feature + 2 * NUM_PAST * (config.ego_status in ("positions", "both"))


def _cameras(inputs: Arrays, at: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    intrinsics = inputs[f"{at}/data/intrinsics"][row][:, :3, :3].astype(np.float64)
    homogeneous = np.tile(np.eye(4), (len(intrinsics), 1, 1))
    homogeneous[:, :3, :3] = intrinsics
    ego_to_camera = np.linalg.inv(homogeneous) @ inputs[f"{at}/data/lidar2img"][row]
    return intrinsics.astype(np.float32), np.linalg.inv(ego_to_camera).astype(np.float32)


def record_of(case: Case, row: int) -> dict[str, Any]:
    """The fields of a record that the ego status reads, from the frames of a case."""
    run = case.frames
    window = run[-1 - NUM_PAST :]
    frames = [
        {
            name.split("/")[-1]: value[row]
            for name, value in case.inputs.items()
            if name.startswith(f"f{index}/data/")
        }
        for index in reversed(window)
    ]
    return record_of_frames(frames, from_start=window[0] == run[0])
