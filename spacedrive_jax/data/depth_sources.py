"""Patch depth of a record, from the first source that has it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact
from spacedrive_jax.bounds import ANY, FROM_ZERO, POSITIVE, SEED, SHARE, Bounds, check_bounds
from spacedrive_jax.constants import CAMERAS, NUM_CAMERAS
from spacedrive_jax.data import lidar
from spacedrive_jax.data.depth_cache import CachedDepth, DepthCache, NetworkKind, find_cache
from spacedrive_jax.data.images import check_cameras, decode_depth
from spacedrive_jax.data.records import Records
from spacedrive_jax.data.schema import Record
from spacedrive_jax.errors import ConfigError, DataError
from spacedrive_jax.models.unprojection import Pooling, pool_depth

DepthSource = Literal["exact", "lidar", "unidepth", "depth_anything", "fused"]
"""`exact`: the renderer's own depth (drawn images only). `lidar`: the sweep, densified on the patch grid.
`unidepth`, `depth_anything`: a network's, from the sidecar that `add-depth` writes. `fused`: the same, scaled
and shifted to fit the sweep; a camera with too few returns has none."""

NETWORKS: tuple[str, ...] = get_args(NetworkKind)


@dataclasses.dataclass(frozen=True)
class DepthDisturbance:
    """Faults added to the depth of the visual tokens, to see what a model makes of them: in training or, of a
    trained run, in its predictions.

    On the grid of visual tokens, in the order of the fields. Noise and holes are drawn from the keyframe's
    token, so that a keyframe always has the same ones.
    """

    blur: float = 0.0
    """Standard deviation of a Gaussian over the grid, visual tokens."""
    scale: float = 1.0
    shift: float = 0.0
    """Metres, added behind the scale."""
    noise: float = 0.0
    """Every token's depth is multiplied by e to the power of a normal draw with this standard deviation."""
    holes: float = 0.0
    """Share of the tokens that lose their depth: they take `far`, as a pixel without depth does."""
    cameras: tuple[str, ...] = ()
    """Of which cameras alone, by channel name (`CAM_FRONT`); none named, of all."""
    seed: int = 0
    """Of the draws."""

    BOUNDS: ClassVar[Bounds] = {
        "blur": FROM_ZERO,
        "scale": POSITIVE,
        "shift": ANY,
        "noise": FROM_ZERO,
        "holes": SHARE,
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "data.depth.disturb")
        check_cameras(self.cameras, "data.depth.disturb.cameras")


NEAREST = 0.1
"""Metres; disturbed depth stays in front of the camera."""


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Where the depth of the visual tokens comes from."""

    sources: tuple[DepthSource, ...] = ("exact", "lidar")
    """In order of preference, chosen for each camera of each keyframe; an error where none has it."""
    pooling: Pooling = "min"
    """The paper min-pools, so that a patch takes its nearest surface (section 3.1)."""
    heights: tuple[float, float] | None = None
    """Least and most metres over the ground (the ego frame's z, flat ground) between which a surface counts:
    a patch then takes its nearest obstacle where it would take the road. Needs depth of every pixel, sources
    `exact` alone. None counts every surface."""
    far: float = 200.0
    """Depth of sky and of surfaces beyond it, metres."""
    cache: str | None = None
    """Name (in RECORDS/depth) or folder of the sidecar with the network's depth; None takes the only one."""
    disturb: DepthDisturbance = DepthDisturbance()
    """Faults of the depth network, made on purpose; none by default."""

    BOUNDS: ClassVar[Bounds] = {"heights": ANY, "far": POSITIVE}

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "data.depth")
        if self.heights is None:
            return
        if not self.heights[0] < self.heights[1]:
            raise ConfigError(f"data.depth.heights {list(self.heights)}: the first must be the lower one")
        if other := [source for source in self.sources if source != "exact"]:
            raise ConfigError(
                f"data.depth.heights needs depth of every pixel: take {', '.join(other)} out of "
                "data.depth.sources, or leave heights None"
            )


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What a network sees of a view."""

    image_size: tuple[int, int]
    """Height and width that it is resized to."""
    channel_order: Literal["rgb", "bgr"]


def open_depth_cache(
    records: Records,
    config: DepthConfig,
    grid: tuple[int, int] | None = None,
    pixels: Pixels | None = None,
    *,
    advice: str = "",
) -> DepthCache | None:
    """The sidecar that the configured sources need; None where none of them is a network's.

    Args:
        records: a records folder.
        config: sources, pooling, which sidecar.
        grid: rows and columns of visual tokens that depth is wanted for; None for whichever it holds.
        pixels: what the network must have seen, which is what the run sees; None where that does not matter.
        advice: the flags of the `add-depth` that would make the sidecar, for the error.

    Raises:
        SpaceDriveError: there is no such sidecar, it belongs to other records, it was made of other pixels,
            it holds patch depth of another grid or pooling, or one is named that no source asks for.
    """
    asked: set[str] = {source for source in config.sources if source in NETWORKS}
    if not asked and "fused" not in config.sources:
        if config.cache is not None:
            raise ConfigError(
                f"data.depth.cache {config.cache!r} holds depth of a network, and data.depth.sources "
                f"({', '.join(config.sources)}) takes none: name {', '.join(NETWORKS)} or fused there, or "
                "leave the cache out"
            )
        return None
    folder = find_cache(records.directory, asked or set(NETWORKS), config.cache, advice=advice)
    cache = DepthCache(folder, records.fingerprint)
    kind = cache.provenance["kind"]
    if asked and kind not in asked:
        raise ConfigError(f"{folder} holds depth of {kind}, data.depth.sources asks for {', '.join(asked)}")
    _check_pixels(cache, pixels, advice)
    if grid is not None and not cache.provenance["full"]:
        _check_grid(tuple(cache.provenance["grid"]), cache.provenance["pooling"], grid, config)
    return cache


def _check_pixels(cache: DepthCache, pixels: Pixels | None, advice: str) -> None:
    network = cache.provenance.get("network")
    if pixels is None or not isinstance(network, dict):
        return
    unlike = []
    if network.get("channel_order") != pixels.channel_order:
        unlike.append(f"channels in the order {network.get('channel_order')}, not {pixels.channel_order}")
    # Depth of every pixel is for any size; what was pooled from another size is not what the run would see.
    if not cache.provenance["full"] and tuple(network.get("image_size", ())) != pixels.image_size:
        height, width = pixels.image_size
        held = "x".join(str(side) for side in network.get("image_size", ()))
        unlike.append(f"images of {held}, not {height}x{width} (height x width)")
    if unlike:
        raise ConfigError(
            f"{cache.folder} was made of other pixels than the run's: {'; '.join(unlike)}. Make depth for "
            f"this run with `python -m data_prep add-depth {advice or '--run CONFIG'}` and name it in "
            "data.depth.cache"
        )


def record_patch_depth(
    record: Record, grid: tuple[int, int], config: DepthConfig, cached: CachedDepth | None = None
) -> tuple[Float[np.ndarray, "N h w"], list[DepthSource]]:
    """Pooled depth of every camera on the grid of visual tokens.

    Args:
        record: a keyframe.
        grid: rows and columns of visual tokens.
        config: sources, pooling, farthest depth, faults to add.
        cached: a network's depth of this keyframe, where a source is a network's (`open_depth_cache`).

    Returns:
        Depth, metres, float32, and which source each camera's came from.

    Raises:
        DataError: a camera has no depth from any of the configured sources, or the cached depth is for
            another grid or pooling.
    """
    depth = np.empty((NUM_CAMERAS, *grid), np.float32)
    used: list[DepthSource] = []
    in_cameras = lidar.points_in_cameras(record) if record["lidar"] and "lidar" in config.sources else None
    for camera in range(NUM_CAMERAS):
        for source in config.sources:
            if source == "exact":
                found = _exact(record, camera, grid, config)
            elif source == "lidar":
                found = _lidar(record, camera, grid, in_cameras)
            else:
                found = _network(record, cached, camera, grid, config, source)
            if found is not None:
                depth[camera] = np.minimum(found, config.far)
                used.append(source)
                break
        else:
            raise DataError(
                f"keyframe {record['token']} has no depth for {CAMERAS[camera]} from "
                f"{' or '.join(config.sources)}: set data.depth.sources to a source the records have, or "
                "convert with --missing-images render; for images of your own, name each camera's `depth` in "
                "the calibration"
            )
    return disturbed(depth, record["token"], config), used


def disturbed(
    depth: Float[np.ndarray, "N h w"], token: str, config: DepthConfig
) -> Float[np.ndarray, "N h w"]:
    """Depth with the faults of `config.disturb`; the same array where there are none.

    Args:
        depth: of the visual tokens, metres.
        token: the keyframe's, which the draws come from.
        config: the faults, and the depth of holes.

    Returns:
        Metres, float32, from `NEAREST` to `config.far`.
    """
    fault = config.disturb
    if fault == DepthDisturbance(cameras=fault.cameras, seed=fault.seed):
        return depth
    # Draws of all cameras, whichever are disturbed: a camera's do not depend on the others.
    digest = hashlib.sha256(f"{fault.seed}:{token}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    normal, share = rng.standard_normal(depth.shape), rng.random(depth.shape)
    changed = depth.astype(np.float64)
    if fault.blur:
        rows, columns = (_blurring(side, fault.blur) for side in depth.shape[1:])
        changed = exact.matmul(exact.matmul(rows, changed), columns.T)
    changed = (changed * fault.scale + fault.shift) * exact.exp(fault.noise * normal)
    changed = np.where(share < fault.holes, config.far, np.clip(changed, NEAREST, config.far))
    chosen = np.array([not fault.cameras or name in fault.cameras for name in CAMERAS])
    return np.where(chosen[:, None, None], changed, depth).astype(np.float32)


def _blurring(side: int, deviation: float) -> Float[np.ndarray, "side side"]:
    """Weights of a Gaussian along one side of the grid; at its edges of what is there."""
    apart = np.arange(side)[:, None] - np.arange(side)
    weights = exact.exp(-0.5 * np.square(apart / deviation))
    return weights / weights.sum(axis=1, keepdims=True)


def _exact(
    record: Record, camera: int, grid: tuple[int, int], config: DepthConfig
) -> Float[np.ndarray, "h w"] | None:
    if not record["exact_depth"][camera]:
        return None
    what = f"keyframe {record['token']}: the {CAMERAS[camera]} depth"
    depth = decode_depth(record["exact_depth"][camera], what)
    counts = depth > 0
    if config.heights is not None:
        height = _heights(record, camera, depth)
        counts &= (height >= config.heights[0]) & (height <= config.heights[1])
    return pool_depth(np.where(counts, depth, np.float32(config.far)), grid, config.pooling)


def _heights(record: Record, camera: int, depth: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Of every pixel's surface over the ground, metres."""
    (rows, columns), (height, width) = depth.shape, record["image_size"][camera]
    mounted, intrinsics = record["camera_to_ego"][camera], record["camera_intrinsics"][camera]
    # The way up per metre of depth along the ray through each pixel's middle.
    u = (np.arange(columns) + 0.5) * (width / columns)
    v = (np.arange(rows) + 0.5) * (height / rows)
    aside = mounted[2, 0] * ((u - intrinsics[0, 2]) / intrinsics[0, 0])
    down = mounted[2, 1] * ((v - intrinsics[1, 2]) / intrinsics[1, 1])
    return depth.astype(np.float64) * (aside[None] + down[:, None] + mounted[2, 2]) + mounted[2, 3]


def _lidar(
    record: Record, camera: int, grid: tuple[int, int], in_cameras: list[np.ndarray] | None
) -> Float[np.ndarray, "h w"] | None:
    if in_cameras is None:
        return None
    height, width = (int(side) for side in record["image_size"][camera])
    sparse = lidar.sparse_patch_depth(
        in_cameras[camera], record["camera_intrinsics"][camera], (height, width), grid
    )
    return lidar.densify(sparse)


def _network(
    record: Record,
    cached: CachedDepth | None,
    camera: int,
    grid: tuple[int, int],
    config: DepthConfig,
    source: DepthSource,
) -> Float[np.ndarray, "h w"] | None:
    if cached is None:
        raise ValueError(f"source {source!r} needs the network's depth of the keyframe: give it as `cached`")
    if not _has_image(record, camera):
        return None
    patch_depth = _cached_patch_depth(cached, camera, grid, config)
    if source != "fused":
        return patch_depth if cached.kind == source else None
    alignment = cached.alignments[camera]
    return lidar.apply(patch_depth, alignment) if alignment.points else None


def _has_image(record: Record, camera: int) -> bool:
    return bool(record["images"][camera])


def _cached_patch_depth(
    cached: CachedDepth, camera: int, grid: tuple[int, int], config: DepthConfig
) -> Float[np.ndarray, "h w"]:
    if cached.full:
        return pool_depth(
            decode_depth(cached.full[camera], "a picture of the depth cache"), grid, config.pooling
        )
    _check_grid(cached.patch_depth.shape[1:], cached.pooling, grid, config)
    return cached.patch_depth[camera]


def _check_grid(held: tuple[int, ...], pooling: str, grid: tuple[int, int], config: DepthConfig) -> None:
    if held != grid or pooling != config.pooling:
        raise ConfigError(
            f"the depth cache holds {pooling}-pooled depth of {held[0]}x{held[1]} tokens, the run "
            f"needs {config.pooling} of {grid[0]}x{grid[1]}: run add-depth with --run CONFIG, or with --full"
        )
