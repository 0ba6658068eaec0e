"""One look for all figures, and figures as addresses that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.io import atomic_write

INK = "#1f2a37"
MUTED = "#6b7785"
GRID = "#e3e8ee"
PREDICTION = "#0072b2"
TRUTH = "#e69f00"
BASELINES: Mapping[str, str] = {
    "constant_velocity": "#009e73",
    "standing_still": "#8a94a0",
    "mean_trajectory": "#cc79a7",
    "ground_truth": TRUTH,
}
"""Okabe and Ito's palette: told apart without red-green vision too."""
DRIVABLE = "#e1e7ee"
BEYOND = "#f8f4ea"
OFF_ROAD = "#ffffff"
AGENTS: Mapping[str, str] = {
    "vehicle": "#2a9d8f",
    "cycle": "#cc79a7",
    "human": "#d55e00",
    "other": "#9aa5b1",
}
"""Road users by kind, from above and in the cameras."""

FORMATS: Mapping[str, str] = {
    ".png": "png",
    ".pdf": "pdf",
    ".svg": "svg",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
}
"""Endings of picture files to what matplotlib calls them."""

SETTINGS: Mapping[str, object] = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "spacedrive_jax",
}


styled = matplotlib.rc_context(dict(SETTINGS))
"""Decorator: the function builds and writes its figures in the project's look (global settings stay)."""


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches with one axes; call it in a `styled` function."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure) -> str:
    """The figure as a data address; the same figure gives the same text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_address(buffer.getvalue(), "image/svg+xml")


def to_png(figure: Figure, dpi: int = 130) -> str:
    """The figure as a data address with pixels: for figures that hold rasters."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return data_address(buffer.getvalue(), "image/png")


def to_jpeg(image: UInt8[np.ndarray, "H W 3"], quality: int = 82) -> str:
    """An RGB photograph as a data address."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return data_address(buffer.getvalue(), "image/jpeg")


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Writes a figure in the format that the file's ending names; it appears only when whole.

    Args:
        figure: to write.
        path: a .png, .pdf, .svg or .jpg file.
        dpi: pixels an inch, of the formats that have pixels.

    Raises:
        ConfigError: another ending.
        SpaceDriveError: the file cannot be written.
    """
    kind = check_picture(path)
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "spacedrive_jax"}), atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def check_picture(path: Path) -> str:
    """The format of a picture by its file's ending.

    Raises:
        ConfigError: it is none that pictures are written in.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: pictures are written as {', '.join(FORMATS)}; give one of these endings")
    return kind


def data_address(content: bytes, media_type: str) -> str:
    """`data:` address of embedded content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def rgb(color: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers 0..255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


COLORS: Mapping[str, str] = {
    "ink": INK,
    "muted": MUTED,
    "line": GRID,
    "run": PREDICTION,
    "recorded": TRUTH,
}
"""The pages' colours, by the names that `templates/style.css` knows."""
