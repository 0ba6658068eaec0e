"""What a run reads and how it becomes samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from spacedrive_jax.bounds import COUNT, FROM_ZERO, SIDE, Bounds, check_bounds
from spacedrive_jax.data.conversation import ConversationConfig
from spacedrive_jax.data.depth_sources import DepthConfig, Pixels
from spacedrive_jax.data.ego_status import EgoFault
from spacedrive_jax.data.images import CameraFault
from spacedrive_jax.data.prompts import CommandSource
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From records to batches."""

    records: str = "data/records"
    """Folder written by `python -m data_prep convert`; or several with their shares of the samples,
    `A:0.7,B:0.3`."""
    tokenizer: str | None = None
    """tokenizer.json or its folder; None takes the project's small one."""
    image_size: tuple[int, int] = (640, 640)
    """Height and width each view is resized to before the image processor."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """The published pipeline hands BGR to everything (fidelity Q26); use `bgr` with its weights."""
    cameras: CameraFault = CameraFault()
    """Bad conditions for the cameras, made on purpose; none by default."""
    command: CommandSource = "navigation"
    target_points: bool = False
    """Name the record's target points, the next two nodes of the route, in the question, as coordinate tokens
    (closed loop); they count towards `max_coordinates`."""
    depth: DepthConfig = DepthConfig()
    ego_fault: EgoFault = "none"
    """Tell the model nothing of its speed and past (`zero`), or what was so a keyframe ago (`late`)."""
    sequence_length: int = 3456
    """S; a longer conversation is an error, not a cut."""
    max_targets: int = 64
    """M; supervised tokens per sample."""
    max_coordinates: int = 6
    """C; coordinates per conversation, the six waypoints, the path points and those of the questions."""
    conversation: ConversationConfig = ConversationConfig()
    drop_without_future: bool = False
    """Leave keyframes without all six future poses out of training (they have no loss)."""
    cache_in_memory: bool = False
    """Keep prepared samples in host memory: for data sets that fit."""
    read_threads: int = 8
    """Samples made at a time, by every worker process where there are some."""
    prefetch_batches: int = 8
    """Batches made ahead; no fewer than `read_threads`, or some of those would have nothing to do."""
    worker_processes: int = 0
    """Processes that make samples, for hosts with more processors than threads of one Python keep busy;
    0 for threads alone. Batches and their order are the same."""

    BOUNDS: ClassVar[Bounds] = {
        "image_size": SIDE,
        "sequence_length": COUNT,
        "max_targets": COUNT,
        "max_coordinates": COUNT,
        "read_threads": COUNT,
        "worker_processes": FROM_ZERO,
        "prefetch_batches": COUNT,
    }

    def __post_init__(self) -> None:
        check_bounds(self, self.BOUNDS, "data")

    @property
    def pixels(self) -> Pixels:
        """What networks see of a view."""
        return Pixels(self.image_size, self.channel_order)


def add_depth_flags(data: DataConfig, vlm: VLConfig) -> str:
    """The flags of the `add-depth` that makes the depth of a run: pixels, grid of visual tokens, pooling.

    Args:
        data: of the run.
        vlm: its vision-language model.
    """
    height, width = data.image_size
    rows, columns = family_of(vlm).image_processor(vlm.vision, data.image_size).token_grid
    return (
        f"--image-size {width}x{height} --channel-order {data.channel_order} --grid {rows}x{columns} "
        f"--pooling {data.depth.pooling}"
    )
