"""Curves: training metrics over steps, and error over the planning horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spacedrive_jax.reporting.style import BASELINES, INK, PREDICTION, TRUTH, new_figure, styled, to_svg

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
