"""A depth network with everything that decides its output, and its run over the images of keyframes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from spacedrive_jax.bounds import SIDE, Bounds, check_bounds
from spacedrive_jax.config import Config
from spacedrive_jax.constants import CAMERAS
from spacedrive_jax.data import lidar
from spacedrive_jax.data.depth_cache import NetworkKind
from spacedrive_jax.data.images import fill_view, scaled_intrinsics
from spacedrive_jax.data.lidar import UNALIGNED, Alignment, FusionConfig, align, depth_pairs
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.interop.depth_anything import MODEL_TYPE, load_depth_anything
from spacedrive_jax.interop.torch_file import weight_file
from spacedrive_jax.interop.unidepth import is_released, load_unidepth
from spacedrive_jax.io import MEBIBYTE, file_sha256
from spacedrive_jax.json_files import convert, read_json
from spacedrive_jax.models.config import ComputeConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.unprojection import Pooling, pool_depth

log = logging.getLogger(__name__)

RELEVANT_FILES = ("*.safetensors", "*.bin", "*.pth", "config.json", "preprocessor_config.json")
REVISION = 1
"""Raised when the numbers that the same weights and settings give change."""


@dataclasses.dataclass(frozen=True)
class DepthNetworkConfig:
    """Weights, and how images reach them."""

    weights: str
    """Checkpoint folder or file: UniDepthV2, or Depth Anything V2 metric in transformers' format."""
    image_size: tuple[int, int] = (640, 640)
    """Height and width that every view is resized to first, as for the language model."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Order the network gets; the published pipeline seems to hand it BGR."""
    camera: Literal["predicted", "given"] = "predicted"
    """Whether UniDepth is told each camera's intrinsics (the published pipeline lets it predict them)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    pooling: Pooling = "min"
    grid: tuple[int, int] = (23, 23)
    """Rows and columns of visual tokens: 23x23 for Qwen2.5-VL at 640x640."""

    BOUNDS: ClassVar[Bounds] = {"image_size": SIDE, "grid": SIDE}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS)
        if any(tokens > pixels for tokens, pixels in zip(self.grid, self.image_size, strict=True)):
            raise ConfigError(
                f"grid {list(self.grid)} has more tokens than image_size {list(self.image_size)} has pixels"
            )

    @classmethod
    def from_file(cls, file: Path) -> DepthNetworkConfig:
        """Reads a JSON file with fields of this class.

        Raises:
            ConfigError: it is damaged, has an unknown field or lacks `weights`.
        """
        try:
            fields = read_json(file, most=MEBIBYTE)
            known = {field.name for field in dataclasses.fields(cls)}
            if isinstance(fields, dict) and (unknown := sorted(set(fields) - known)):
                raise ConfigError(f"unknown fields {', '.join(unknown)}")
            return convert(fields, cls, "it")
        except SpaceDriveError as error:
            raise ConfigError(f"{file} does not describe a depth network: {error}") from error

    @classmethod
    def of(cls, weights: Path) -> DepthNetworkConfig:
        """What a flag names: a JSON file (`from_file`), or weights, with the settings of this class.

        Raises:
            ConfigError: the JSON file does not describe a network.
        """
        return cls.from_file(weights) if weights.suffix == ".json" else cls(weights=str(weights))

    def for_run(self, config: Config) -> DepthNetworkConfig:
        """The same network, looking at images as a run does: its size, channel order, pooling and grid."""
        data, vlm = config.data, config.model.vlm
        return dataclasses.replace(
            self,
            image_size=data.image_size,
            channel_order=data.channel_order,
            pooling=data.depth.pooling,
            grid=family_of(vlm).image_processor(vlm.vision, data.image_size).token_grid,
        )

    def kind(self) -> NetworkKind:
        """Which network the weights are of."""
        file = Path(self.weights) / "config.json"
        content = read_json(file, most=16 * MEBIBYTE) if file.is_file() else None
        named = content.get("model_type") if isinstance(content, dict) else None
        return "depth_anything" if named == MODEL_TYPE else "unidepth"

    def fingerprint(self) -> str:
        """SHA-256 over the settings and the contents of the weights.

        Raises:
            CheckpointError: there are no weights.
        """
        located = weight_file(self.weights)
        folder = located if located.is_dir() else located.parent
        named = {path for pattern in RELEVANT_FILES for path in folder.glob(pattern)}
        files = named if located.is_dir() else {located, folder / "config.json"} & (named | {located})
        digest = hashlib.sha256()
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "weights"}
        digest.update(json.dumps({"revision": REVISION, **settings}, sort_keys=True).encode())
        for file in sorted(files):
            digest.update(bytes.fromhex(file_sha256(file)))
        return digest.hexdigest()


class KeyframeDepth:
    """Runs the network over the views of keyframes, on all devices of this process."""

    def __init__(self, config: DepthNetworkConfig) -> None:
        """Loads the weights onto every device."""
        self.config = config
        compute = ComputeConfig(dtype=config.dtype, param_dtype=config.dtype)
        model: nnx.Module
        if config.kind() == "unidepth":
            if is_released(config.weights):
                log.warning("UniDepth's released weights are for non-commercial use only (CC BY-NC 4.0)")
            model = load_unidepth(config.weights, compute=compute)
        else:
            # Pooling absorbs the network's own size, as in SpaceDrive.
            model = load_depth_anything(config.weights, image_sized_output=False, compute=compute)
        mesh = Mesh(np.asarray(jax.local_devices()), ("images",))
        self._images = NamedSharding(mesh, PartitionSpec("images"))
        graph, state = nnx.split(model)
        self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

        def run(state: nnx.State, images: Array, intrinsics: Array | None) -> tuple[Array, Array]:
            depth = nnx.merge(graph, state)(images, intrinsics).depth
            return depth, pool_depth(depth, config.grid, config.pooling)

        # Each device runs its own images: no kernel needs to be cut up, and nothing is sent between them.
        whole, mine = PartitionSpec(), PartitionSpec("images")
        on_shards = jax.shard_map(
            run, mesh=mesh, in_specs=(whole, mine, mine), out_specs=mine, check_vma=False
        )
        self._run = jax.jit(on_shards)

    def compiled(self, images: int) -> jax.stages.Compiled:
        """The program for so many images (a multiple of the devices): its memory, its traffic."""
        size = self.config.image_size

        def placed(*shape: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=self._images)

        given = placed(3, 3, dtype=np.float32) if self.config.camera == "given" else None
        return self._run.lower(self._state, placed(*size, 3, dtype=np.uint8), given).compile()

    def __call__(
        self, records: list[Record]
    ) -> tuple[Float[np.ndarray, "R N H W"], Float[np.ndarray, "R N h w"]]:
        """Depth of every view of some keyframes, of its pixels and of its patches, metres.

        An absent image counts as black; readers leave its depth out.
        """
        size, order = self.config.image_size, self.config.channel_order
        images = np.concatenate([keyframe_views(record, size, order) for record in records])
        intrinsics = None
        if self.config.camera == "given":
            cameras = [scaled_intrinsics(record, self.config.image_size) for record in records]
            intrinsics = np.concatenate(cameras).astype(np.float32)
        count = len(images)
        padding = -count % self._images.mesh.size
        placed = jax.device_put(
            jax.tree.map(
                lambda array: np.concatenate([array, np.repeat(array[-1:], padding, axis=0)]),
                (images, intrinsics),
            ),
            self._images,
        )
        full, patch_depth = jax.device_get(self._run(self._state, *placed))
        shape = (len(records), len(CAMERAS))
        return (
            full[:count].astype(np.float32).reshape(*shape, *full.shape[1:]),
            patch_depth[:count].astype(np.float32).reshape(*shape, *patch_depth.shape[1:]),
        )


def keyframe_views(
    record: Record, image_size: tuple[int, int], channel_order: Literal["rgb", "bgr"] = "rgb"
) -> UInt8[np.ndarray, "N H W 3"]:
    """The views of a keyframe as a depth network gets them: decoded, and resized to one size.

    An absent image is black.

    Raises:
        DataError: an image cannot be decoded.
        ConfigError: it was kept at another size.
    """
    height, width = image_size
    views = np.zeros((len(CAMERAS), height, width, 3), np.uint8)
    for camera, view in enumerate(views):
        if record["images"][camera]:
            fill_view(record, camera, view, channel_order=channel_order)
    return views


def camera_alignments(
    record: Record, views: Float[np.ndarray, "N H W"], config: FusionConfig | None = None
) -> list[Alignment]:
    """Fits every view of a keyframe to its LiDAR sweep; unaligned where there is none or too little."""
    if not record["lidar"]:
        return [UNALIGNED] * len(views)
    size = (views.shape[1], views.shape[2])
    intrinsics = scaled_intrinsics(record, size)
    return [
        align(*depth_pairs(view, points, camera), config)
        for view, points, camera in zip(views, lidar.points_in_cameras(record), intrinsics, strict=True)
    ]


def provenance(config: DepthNetworkConfig, records_fingerprint: str) -> Mapping[str, Any]:
    """What a sidecar says of how it was made."""
    return {
        "kind": config.kind(),
        "fingerprint": config.fingerprint(),
        "records_fingerprint": records_fingerprint,
        "pooling": config.pooling,
        "grid": config.grid,
        "network": dataclasses.asdict(config),
    }
