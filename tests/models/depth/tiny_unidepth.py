"""A UniDepthV2 small enough to compile in seconds."""

from pathlib import Path

from spacedrive_jax.interop.unidepth import save_unidepth
from spacedrive_jax.models.depth.backbone import Dinov2Config
from spacedrive_jax.models.depth.unidepth import UniDepthConfig, UniDepthV2
from spacedrive_jax.models.partitioning import initialize

TINY = UniDepthConfig(
    encoder=Dinov2Config(
        width=16, depth=4, heads=2, taps=(1, 2, 3, 4), position_grid=(3, 3), final_norm_eps=1e-5
    ),
    width=16,
    heads=2,
    expansion=2,
    units=(1, 1, 1),
    pixel_bounds=(2000, 4000),
)


def make_tiny() -> UniDepthV2:
    """The network with random weights."""
    return initialize(lambda rngs: UniDepthV2(TINY, rngs=rngs), seed=0)


def save_tiny(folder: Path) -> None:
    """Writes it as a checkpoint."""
    save_unidepth(make_tiny(), folder)
