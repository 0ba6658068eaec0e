"""The style sheet of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# One look for all figures, and figures as strings that a page can hold.


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


def data_address(content: bytes, media_type: str) -> str:
    """`data:` address of embedded content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def rgb(color: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers 0..255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


STYLESHEET = f"""
:root {{ color-scheme: light; --ink: {INK}; --muted: {MUTED}; --line: {GRID}; --run: {PREDICTION}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f4f6f8; color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
header, main {{ max-width: 1120px; margin: 0 auto; padding: 0 20px; }}
header {{ padding-top: 36px; }}
.kicker {{ margin: 0; color: var(--muted); font-size: 13px; letter-spacing: .04em; }}
h1 {{ margin: 2px 0 18px; font-size: 28px; font-weight: 650; overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 14px; font-size: 19px; font-weight: 620; }}
h3 {{ margin: 0 0 6px; font-size: 15px; font-weight: 620; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 0 0 20px; }}
.tiles div, section, .notices {{ background: #fff; border: 1px solid var(--line); border-radius: 10px; }}
.tiles div {{ padding: 12px 16px; }}
.tiles dt {{ color: var(--muted); font-size: 12.5px; }}
.tiles dd {{ margin: 0; font-size: 22px; font-weight: 620; font-variant-numeric: tabular-nums; }}
section, .notices {{ padding: 20px 22px; margin: 0 0 18px; }}
.notices {{ border-left: 4px solid {TRUTH}; }}
.notices h2 {{ font-size: 15px; margin-bottom: 6px; }}
.notices ul {{ margin: 0; padding-left: 18px; }}
.absent, .note, figcaption {{ color: var(--muted); }}
.note, figcaption {{ font-size: 13px; margin: 8px 0 16px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 6px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
thead th {{ color: var(--muted); font-weight: 550; }}
thead [scope=colgroup] {{ text-align: center; }}
th[scope=row], thead th:first-child[rowspan] {{ text-align: left; font-weight: 500; }}
.first {{ border-left: 1px solid var(--line); }}
td.avg {{ font-weight: 620; }}
tr.run > * {{ background: #eef6fb; }}
tr.run th {{ color: var(--run); font-weight: 650; }}
table.plain th {{ color: var(--muted); width: 30%; vertical-align: top; }}
table.plain td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
img {{ max-width: 100%; display: block; border-radius: 6px; }}
.figure {{ width: 720px; }}
article + article {{ margin-top: 26px; padding-top: 22px; border-top: 1px solid var(--line); }}
.facts {{ margin: 0 0 12px; color: var(--muted); font-size: 13.5px; }}
.facts b {{ color: var(--ink); font-weight: 550; overflow-wrap: anywhere; }}
.case {{ display: grid; grid-template-columns: minmax(0, 1.75fr) minmax(0, 1fr); gap: 18px;
  align-items: start; }}
figure {{ margin: 0; }}
.key {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 4px 0 2px; }}
.key.recorded {{ margin-left: 10px; background: {TRUTH}; }}
.key.predicted {{ background: {PREDICTION}; }}
blockquote {{ margin: 0; padding: 8px 12px; background: #f7f9fb; border-radius: 6px; font-size: 13px;
  overflow-wrap: anywhere; }}
summary {{ cursor: pointer; color: var(--run); margin: 10px 0; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }}
@media (max-width: 720px) {{
  header, main {{ padding: 0 12px; }}
  header {{ padding-top: 22px; }}
  section, .notices {{ padding: 16px 14px; }}
  .case {{ grid-template-columns: minmax(0, 1fr); }}
}}
"""
