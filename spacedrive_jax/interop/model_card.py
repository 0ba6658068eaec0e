"""The model card of exported weights: base, licence, data, scores, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spacedrive_jax.data.mixture import mixed_fingerprint, records_sources
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.io import MEBIBYTE, read_text
from spacedrive_jax.json_files import read_json

CARD = "README.md"
MOST_CARD = MEBIBYTE
_LICENCE = re.compile(r"^license(?:_name)?:\s*([\w.+-]+)\s*$", re.MULTILINE)

LOADING: Mapping[str, str] = {
    "hf": """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("PATH")
model = AutoModelForImageTextToText.from_pretrained("PATH")
```

It is the vision-language model alone: transformers has no place for the coordinate encoder and the
coordinate decoder.""",
    "safetensors": """```python
from spacedrive_jax import Planner

planner = Planner.load("PATH")
plan = planner.plan(planner.records("RECORDS")[0])
plan.figure().savefig("plan.png")
```

`python -m spacedrive_jax show PATH --records RECORDS`, and `predict`, `drive` and `serve` with `--checkpoint
PATH`, take it too.""",
}


_SCORED = {"protocol", "l2", "collision", "samples", "records", "predictions_sha256"}
"""What an evaluation says."""


def base_licence(base: Path | None) -> str | None:
    """The licence that a base's own model card names; None where it has no card, or names none."""
    if base is None or not (base / CARD).is_file():
        return None
    text = read_text(base / CARD, most=MOST_CARD)
    front = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    named = _LICENCE.findall(front)
    return named[-1] if named else None


def data_licence(records: str, fingerprint: str | None) -> tuple[str, str]:
    """What a records folder says of its data: licence, and the version it was converted from; "" for neither.

    Args:
        records: `data.records` of a run; folders that are not here, or hold other records now, say nothing.
        fingerprint: of the records that the run was trained on.
    """
    licences, versions = [], []
    try:
        found = [read_provenance(folder) for folder, _ in records_sources(records)]
    except SpaceDriveError:
        return "", ""
    if mixed_fingerprint([str(each.get("fingerprint")) for each in found]) != fingerprint:
        return "", ""
    for provenance in found:
        source = provenance.get("source")
        licences.append(provenance.get("licence"))
        versions.append(source.get("version") if isinstance(source, dict) else None)
    said = [dict.fromkeys(each for each in found if isinstance(each, str)) for found in (licences, versions)]
    return " ".join(said[0]), ", ".join(said[1])


def scores_of(run_dir: Path, trainable_fingerprint: str | None) -> list[Mapping[str, Any]]:
    """The scores in a run folder that are of these very numbers: of the predictions that `predict` noted in
    run.json, on the records that they were made on.

    Args:
        run_dir: the run's folder.
        trainable_fingerprint: of the checkpoint.
    """
    found: list[Mapping[str, Any]] = []
    try:
        predicted = read_json(run_dir / "run.json", most=16 * MEBIBYTE)["predicted"]
        of_these = predicted["trainable_fingerprint"] == trainable_fingerprint and not predicted["average"]
        wanted = predicted["sha256"], predicted["records_fingerprint"], predicted["split"]
    except (SpaceDriveError, KeyError, TypeError):
        return found
    if not of_these or trainable_fingerprint is None:
        return found
    for file in sorted(run_dir.glob("*.json")):
        try:
            content = read_json(file, most=16 * MEBIBYTE)
        except SpaceDriveError:
            continue
        if not isinstance(content, dict) or not content.keys() >= _SCORED:
            continue
        source = content["records"] if isinstance(content["records"], dict) else {}
        made_of = content["predictions_sha256"], source.get("fingerprint"), source.get("split")
        as_they_are = content.get("discrete_coords") is None and content.get("axes") in (None, "forward-left")
        if made_of == wanted and as_they_are:
            found.append(content)
    return found


def model_card(
    *,
    name: str,
    base: str | None,
    kind: Literal["hf", "safetensors"],
    licence: str | None,
    details: Mapping[str, str],
    scores: Sequence[Mapping[str, Any]] = (),
    processor: bool = True,
) -> str:
    """The text of a card, with the front matter that model hubs read.

    Args:
        name: of the run.
        base: what the weights were trained from; None where they were drawn.
        kind: how it is loaded.
        licence: of the base; None where it is not known.
        details: what is known of where it comes from, in words.
        scores: of `evaluate`.
        processor: whether a processor lies beside the weights, or the tokenizer alone.
    """
    lines = ["---", "library_name: " + ("transformers" if kind == "hf" else "spacedrive_jax")]
    lines += [f"license: {licence}"] if licence else []
    lines += ["tags:", "- spacedrive", "- autonomous-driving", "---", f"# {name}", ""]
    loading = LOADING[kind]
    if not processor:
        loading = loading.replace("AutoProcessor", "AutoTokenizer").replace("processor =", "tokenizer =")
    lines += [
        "SpaceDrive ([arXiv 2512.10719](https://arxiv.org/abs/2512.10719)), trained with spacedrive_jax.",
        "",
        f"* **Base**: {base or 'none, everything was trained from numbers drawn by the seed'}",
        f"* **Licence**: {_licence_line(base, licence)}",
        *(f"* **{name}**: {value}" for name, value in details.items()),
        "",
        "## Scores",
        *_score_lines(scores),
        "",
        "## How to load it",
        loading,
    ]
    return "\n".join(lines) + "\n"


def _licence_line(base: str | None, licence: str | None) -> str:
    if base is None:
        return "no base to inherit one from; that of the data applies"
    if licence is None:
        return "the base's card names none that could be read here; the base's applies, and that of the data"
    return f"{licence}, that of the base; that of the data applies too"


def _score_lines(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    if not scores:
        return ["None were recorded with these numbers."]
    lines = [
        "| protocol | split | keyframes | L2 at 1 / 2 / 3 s, m | average | collision, % |",
        "|---|---|---|---|---|---|",
    ]
    for each in scores:
        l2, collision = each["l2"], each["collision"]
        protocol = f"{each['protocol']}, people too" if each.get("pedestrians") else each["protocol"]
        horizon = " / ".join(_number(l2.get(column)) for column in ("1s", "2s", "3s"))
        lines.append(
            f"| {protocol} | {each['records']['split']} | {each['samples']} | {horizon} "
            f"| {_number(l2.get('avg'))} | {_number(collision.get('avg'))} |"
        )
    return lines


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
