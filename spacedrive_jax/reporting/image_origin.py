"""Where camera images come from, in words: photographed, rendered, or absent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spacedrive_jax.data.records import Record

PHOTOGRAPHED_VERSIONS = frozenset({"v1.0-trainval", "v1.0-test", "v1.0-mini"})
"""The official nuScenes versions: their image files are photographs. Of others only the origin is known."""


@dataclasses.dataclass(frozen=True)
class ImageOrigin:
    """How many camera images are of which kind.

    Attributes:
        original: taken from the dataset's own image files.
        rendered: drawn when the records were made, because the dataset had no file.
        absent: cameras without pixels.
    """

    original: int = 0
    rendered: int = 0
    absent: int = 0

    def __add__(self, other: ImageOrigin) -> ImageOrigin:
        return ImageOrigin(
            self.original + other.original, self.rendered + other.rendered, self.absent + other.absent
        )

    def describe(self, provenance: dict[str, Any]) -> str:
        """In words, for example `4 photographed, 2 rendered of 6`.

        Args:
            provenance: of the records folder; its dataset version says whether files are photographs.
        """
        version = provenance.get("source", {}).get("version", "an unnamed dataset")
        kind = "photographed" if version in PHOTOGRAPHED_VERSIONS else f"from the files of {version}"
        counts = ((self.original, kind), (self.rendered, "rendered"), (self.absent, "absent"))
        parts = [(count, word) for count, word in counts if count]
        total = self.original + self.rendered + self.absent
        if len(parts) == 1:
            return f"all {total} {parts[0][1]}"
        return ", ".join(f"{count} {word}" for count, word in parts) + f" of {total}"


def image_origin(record: Record) -> ImageOrigin:
    """Counts the record's camera images by kind."""
    present = np.array([bool(image) for image in record["images"]])
    rendered = np.asarray(record["image_rendered"], bool)
    return ImageOrigin(
        int((present & ~rendered).sum()), int((present & rendered).sum()), int((~present).sum())
    )
