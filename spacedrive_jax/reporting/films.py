"""A drive from above as a moving SVG, and its curves: no script, no network, whoever opens it sees it move.

Boxes move by SMIL animations, which every browser plays inside a page without scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from spacedrive_jax.reporting.style import AGENTS, DRIVABLE, GRID, INK, MUTED, PREDICTION

EVERY = 2
"""Time steps between two key frames of the animation."""
MARGIN = 25.0
"""Metres shown around the way."""
EGO_SIZE = (5.5, 1.9)
EGO_AHEAD = 0.65
_WIDTH, _HEIGHT = 520, 90


def film(trace: Mapping[str, Any]) -> markupsafe.Markup:
    """The whole drive, seen from above, played over and over at twice its speed.

    Args:
        trace: what `drive` keeps of a drive (trace.json).
    """
    ego = np.array(trace["ego"], np.float64)
    steps, seconds = len(ego), max(len(ego) * trace["step_s"] / 2, 0.1)
    low, high = ego[:, :2].min(axis=0) - MARGIN, ego[:, :2].max(axis=0) + MARGIN
    width, height = high - low
    parts = [
        f'<svg viewBox="0 0 {width:.1f} {height:.1f}" role="img" aria-label="The drive from above" '
        f'style="background:#fff;width:100%;max-height:520px">',
        # y grows upwards in the world, downwards on the page.
        f'<g transform="translate({-low[0]:.2f} {high[1]:.2f}) scale(1 -1)">',
    ]
    parts += [_polygon(ring, DRIVABLE) for ring in trace["road"]]
    parts += [_line(line, "#ffffff", 0.25, "1 1.5") for line in trace["lanes"]]
    parts.append(_line(trace["route"], "#9ec5e8", 0.6))
    parts.append(_line(ego[:, :2].tolist(), INK, 0.25))
    for other in trace["others"]:
        poses = np.array(other["poses"], np.float64)
        near = np.min(np.abs(poses[:, None, :2] - ego[None, ::10, :2]).max(axis=-1)) < 60.0
        if near:
            parts.append(_box(poses, other["size"], _color(other["category"]), steps, seconds))
    centre = ego[:, :3].copy()
    centre[:, 0] += EGO_AHEAD * np.cos(ego[:, 2])
    centre[:, 1] += EGO_AHEAD * np.sin(ego[:, 2])
    parts.append(_plans(trace, seconds, steps))
    parts.append(_box(centre, EGO_SIZE, INK, steps, seconds))
    parts.append("</g></svg>")
    return markupsafe.Markup("".join(parts))


def _color(category: str) -> str:
    if category.startswith("human."):
        return AGENTS["human"]
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return AGENTS["cycle"]
    return AGENTS["vehicle"] if category.startswith("vehicle.") else AGENTS["other"]


def _box(poses: np.ndarray, size: Sequence[float], color: str, steps: int, seconds: float) -> str:
    length, width = size[0], size[1]
    rect = (
        f'<rect x="{-length / 2:.2f}" y="{-width / 2:.2f}" width="{length:.2f}" height="{width:.2f}" '
        f'rx="0.3" fill="{color}"/>'
    )
    if len(poses) == 1:
        x, y, yaw = poses[0]
        return f'<g transform="translate({x:.2f} {y:.2f}) rotate({np.degrees(yaw):.1f})">{rect}</g>'
    shown = poses[::EVERY]
    turned = np.degrees(np.unwrap(shown[:, 2]))
    places = ";".join(f"{x:.2f} {y:.2f}" for x, y in shown[:, :2])
    turns = ";".join(f"{angle:.1f}" for angle in turned)
    timing = f'dur="{seconds:.2f}s" repeatCount="indefinite"'
    move = '<g><animateTransform attributeName="transform" type="{}" values="{}" {}/>'
    return f"{move.format('translate', places, timing)}{move.format('rotate', turns, timing)}{rect}</g></g>"


def _plans(trace: Mapping[str, Any], seconds: float, steps: int) -> str:
    """Each plan, seen while it is followed."""
    decisions = [decision for decision in trace["decisions"] if decision["waypoints"]]
    whole = steps * trace["step_s"]
    parts = []
    for number, decision in enumerate(decisions):
        begin = (decision["time"] - decisions[0]["time"]) / whole
        end = (
            (decisions[number + 1]["time"] - decisions[0]["time"]) / whole
            if number + 1 < len(decisions)
            else 1.0
        )
        if not 0 <= begin < end <= 1:
            continue
        x, y, yaw = decision["pose"]
        points = np.array([[0.0, 0.0], *decision["waypoints"]])
        cos, sin = np.cos(yaw), np.sin(yaw)
        placed = np.stack(
            [x + cos * points[:, 0] - sin * points[:, 1], y + sin * points[:, 0] + cos * points[:, 1]], 1
        )
        times, values = ("0", "1") if begin == 0 else (f"0;{begin:.4f}", "0;1")
        if end < 1:
            times, values = f"{times};{end:.4f}", f"{values};0"
        parts.append(
            f'<g opacity="0"><animate attributeName="opacity" calcMode="discrete" values="{values}" '
            f'keyTimes="{times}" dur="{seconds:.2f}s" repeatCount="indefinite"/>'
            f"{_line(placed.tolist(), PREDICTION, 0.5)}</g>"
        )
    return "".join(parts)


def _points(points: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{point[0]:.2f},{point[1]:.2f}" for point in points)


def _line(points: Sequence[Sequence[float]], color: str, width: float, dashes: str = "none") -> str:
    return (
        f'<polyline points="{_points(points)}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _polygon(points: Sequence[Sequence[float]], color: str) -> str:
    return f'<polygon points="{_points(points)}" fill="{color}"/>'


def strip(trace: Mapping[str, Any]) -> markupsafe.Markup:
    """Speed, acceleration and steering over the time of the drive."""
    ego = np.array(trace["ego"], np.float64)
    curves = (
        ("speed, m/s", ego[:, 3], 0.0, max(float(ego[:, 3].max()), 5.0)),
        ("acceleration, m/s²", ego[:, 4], -7.0, 3.0),
        ("steering, °", np.degrees(ego[:, 5]), -35.0, 35.0),
    )
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT * len(curves)}" role="img" aria-label="Curves of the drive">'
    ]
    for row, (name, values, low, high) in enumerate(curves):
        top = row * _HEIGHT
        x = np.linspace(0, _WIDTH, len(values))
        y = top + _HEIGHT - 8 - (np.clip(values, low, high) - low) / (high - low) * (_HEIGHT - 26)
        zero = top + _HEIGHT - 8 - (0 - low) / (high - low) * (_HEIGHT - 26)
        parts.append(f'<line x1="0" x2="{_WIDTH}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="{GRID}"/>')
        parts.append(_line(np.stack([x, y], axis=1).tolist(), PREDICTION, 1.5))
        parts.append(f'<text x="2" y="{top + 12}" font-size="11" fill="{MUTED}">{name}</text>')
    seconds = len(ego) * trace["step_s"]
    parts.append(
        f'<text x="{_WIDTH}" y="{_HEIGHT * len(curves) - 1}" text-anchor="end" font-size="10" fill="{MUTED}">'
        f"{seconds:.0f} s</text></svg>"
    )
    return markupsafe.Markup("".join(parts))
