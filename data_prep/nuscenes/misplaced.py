"""Data that are there, but not where they are read: archives unpacked one folder off.

What a record may do without (CAN bus, map expansion, LiDAR) would otherwise be left out with a mere count,
and a model trained on zeros.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.nuscenes.can_bus import pose_file
from data_prep.nuscenes.maps import expansion_file
from spacedrive_jax.data.keyframe import Scene
from spacedrive_jax.errors import DataError

_PREFIXES = ("", "*/", "*/*/")


def check_layout(dataroot: Path, scenes: Sequence[Scene]) -> None:
    """Refuses a dataroot in which CAN bus, map expansion or LiDAR lie in another folder than their own.

    Data that are nowhere are no error: they are separate downloads.

    Raises:
        DataError: naming the file that was found and the place where it is read.
    """
    for wanted in _absent(dataroot, scenes):
        found = find_elsewhere(dataroot, wanted)
        if found is not None:
            raise DataError(
                f"{found} is one folder off: it is read as {wanted}. Move its folder there, or remove it to "
                "convert without"
            )


def find_elsewhere(dataroot: Path, wanted: Path) -> Path | None:
    """A file that is not where it should be, up to three folders below the dataroot.

    Args:
        dataroot: where to look.
        wanted: the file's place, below the dataroot.
    """
    parts = wanted.relative_to(dataroot).parts
    for first in range(len(parts)):
        tail = glob.escape("/".join(parts[first:]))
        for prefix in _PREFIXES:
            for found in sorted(dataroot.glob(prefix + tail)):
                if found != wanted and found.is_file():
                    return found
    return None


def _absent(dataroot: Path, scenes: Sequence[Scene]) -> Iterator[Path]:
    """One file of every kind of data of which there is none."""
    poses = [pose_file(dataroot, scene.name) for scene in scenes]
    if not any(path.exists() for path in poses):
        yield from poses[:3]  # a few scenes were recorded without
    for location in dict.fromkeys(scene.location for scene in scenes):
        if not expansion_file(dataroot, location).exists():
            yield expansion_file(dataroot, location)
    sweeps = [dataroot / scene.keyframes[0].lidar.filename for scene in scenes]
    if not any(path.exists() for path in sweeps):
        yield sweeps[0]
