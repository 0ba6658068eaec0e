"""Figures: one look for all, addresses that a page can hold, and the curves of a run.

Curves are training metrics over steps, and error over the planning horizon.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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


LINE_COLORS = (INK, PREDICTION, TRUTH, "#009e73", "#cc79a7", "#56b4e9")
LABELS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "displacement_m": "Waypoint error (m)",
    "step_seconds": "Seconds a step",
    "samples_per_second": "Samples a second",
    "tokens_per_second": "Tokens a second",
    "validation/l2": "Validation L2 (m)",
    "validation/collision": "Validation collision (%)",
}
SMOOTH_ABOVE = 60
"""Curves with more points than this are drawn pale with a running mean over them."""


@styled
def training_curves(steps: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """One panel for the losses together and one for each other logged number.

    Args:
        steps: logged steps in order; keys may come and go.

    Returns:
        (title, SVG data address) per panel.
    """
    names = list(dict.fromkeys(name for step in steps for name in step if name != "step"))
    losses = [name for name in names if name.startswith("loss") or name == "validation/loss"]
    panels = [("Loss", losses)] if losses else []
    panels += [
        (LABELS.get(name, name.replace("_", " ").capitalize()), [name])
        for name in names
        if name not in losses
    ]
    return [(title, _panel(title, members, steps)) for title, members in panels]


def _panel(title: str, names: Sequence[str], steps: Sequence[Mapping[str, float]]) -> str:
    figure, axes = new_figure(4.2, 2.6)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    smallest, largest = np.inf, 0.0
    for name, color in zip(names, _cycle(len(names)), strict=True):
        x, y = _series(name, steps)
        _draw_series(axes, x, y, color, name.removeprefix("loss_").replace("_", " "))
        positive = y[np.isfinite(y) & (y > 0)]
        if len(positive):
            smallest, largest = min(smallest, positive.min()), max(largest, positive.max())
    if title == "Loss" and smallest > 0 and largest > 50 * smallest:
        axes.set_yscale("log")
    elif names == ["learning_rate"]:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if len(names) > 1:
        axes.legend(fontsize=8)
    return to_svg(figure)


def _cycle(count: int) -> list[str]:
    return [LINE_COLORS[index % len(LINE_COLORS)] for index in range(count)]


def _series(
    name: str, steps: Sequence[Mapping[str, float]]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    points = np.array([(step["step"], step[name]) for step in steps if name in step], np.float64)
    return points[:, 0], points[:, 1]


def _draw_series(
    axes: Axes, x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], color: str, label: str
) -> None:
    if len(x) <= SMOOTH_ABOVE:
        axes.plot(
            x, y, color=color, linewidth=1.5, marker="o" if len(x) < 15 else None, markersize=3, label=label
        )
        return
    width = max(len(x) // 30, 3)
    kernel = np.ones(width) / width
    axes.plot(x, y, color=color, linewidth=0.7, alpha=0.25)
    middle = slice((width - 1) // 2, (width - 1) // 2 + len(x) - width + 1)
    axes.plot(x[middle], np.convolve(y, kernel, mode="valid"), color=color, linewidth=1.6, label=label)


@styled
def compared_curves(
    runs: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]],
) -> list[tuple[str, str]]:
    """One panel for each number that any of several runs logs, a line a run.

    Args:
        runs: name to its colour and its logged steps in order.

    Returns:
        (title, SVG data address) per panel.
    """
    names = list(dict.fromkeys(name for _, steps in runs.values() for step in steps for name in step))
    panels = []
    for name in names:
        if name == "step":
            continue
        title = LABELS.get(name, name.replace("_", " ").capitalize())
        figure, axes = new_figure(4.2, 2.6)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for run, (color, steps) in runs.items():
            if any(name in step for step in steps):
                x, y = _series(name, steps)
                _draw_series(axes, x, y, color, run)
        panels.append((title, to_svg(figure)))
    return panels


@styled
def horizon_plot(errors: Mapping[str, Float[np.ndarray, "S T"]]) -> str:
    """Mean displacement error at each of the six waypoints, with the 10-90 % band of the prediction.

    Args:
        errors: planner name to distances in metres; `prediction` is drawn strongest.
    """
    figure, axes = new_figure(6.4, 3.4)
    seconds = 0.5 * np.arange(1, next(iter(errors.values())).shape[1] + 1)
    for name, values in errors.items():
        predicted = name == "prediction"
        color = PREDICTION if predicted else BASELINES[name]
        if predicted:
            low, high = np.percentile(values, [10, 90], axis=0)
            axes.fill_between(seconds, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(
            seconds,
            values.mean(axis=0),
            color=color,
            linewidth=2.4 if predicted else 1.4,
            marker="o",
            markersize=5 if predicted else 3,
            label=f"{name.replace('_', ' ')}, mean" + (" and 10-90 % band" if predicted else ""),
            zorder=3 if predicted else 2,
        )
    axes.set_xlabel("seconds ahead")
    axes.set_ylabel("distance to the recorded waypoint (m)")
    axes.set_ylim(bottom=0)
    axes.set_xticks(seconds)
    axes.legend(fontsize=8)
    return to_svg(figure)
