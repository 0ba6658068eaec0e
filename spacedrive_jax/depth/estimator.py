"""What every depth network here is: images in, metric depth out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jaxtyping import Array, Float, UInt8


class DepthPrediction(NamedTuple):
    """Depth of a batch of images, at the images' size."""

    depth: Float[Array, "B H W"]
    """z in the camera frame, metres."""
    confidence: Float[Array, "B H W"] | None
    """UniDepth's estimate of its error in log space: it ranks the pixels of one image, higher is worse.
    None where the network gives none."""
    intrinsics: Float[Array, "B 3 3"] | None
    """As the network sees the camera, pixels; None where it has no notion of one."""


class DepthEstimator(Protocol):
    """A frozen depth network; traceable by jax.jit."""

    def __call__(
        self, images: UInt8[Array, "B H W 3"], intrinsics: Float[Array, "B 3 3"] | None = None
    ) -> DepthPrediction:
        """Predicts depth.

        Args:
            images: RGB, 0..255.
            intrinsics: pixels of the images, one camera per image; None lets the network predict (UniDepth)
                or is ignored (Depth Anything).
        """
        ...
