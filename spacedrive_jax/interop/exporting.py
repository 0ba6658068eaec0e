"""Writers of weights for others: what this project trained or imported, as transformers and PEFT have it.

Beside them the model card: base, licence, data, scores, how to load it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from spacedrive_jax.data.loader import mixed_fingerprint, records_sources
from spacedrive_jax.data.records_folder import read_provenance
from spacedrive_jax.data.tokenizer import DrivingTokenizer, load_tokenizer
from spacedrive_jax.errors import CheckpointError, SpaceDriveError
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.interop.importing import copy_tokenizer
from spacedrive_jax.interop.peft import save_adapter
from spacedrive_jax.interop.safetensors_folder import save_tensors
from spacedrive_jax.interop.weight_table import new_token_rules
from spacedrive_jax.io import MEBIBYTE, is_there, read_text, write_part, write_text
from spacedrive_jax.json_files import read_json, write_json
from spacedrive_jax.models.config import VLConfig
from spacedrive_jax.models.families import family_of
from spacedrive_jax.models.language_model import NewTokenParam
from spacedrive_jax.models.partitioning import to_host
from spacedrive_jax.models.vision_language import VisionLanguageModel

NEW_TOKENS_FILE = "new_tokens.safetensors"


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A vision-language model and what belongs to it."""

    model: VisionLanguageModel
    base_name: str
    """What the base checkpoint is called."""
    write_tokenizer: Callable[[Path], None]
    """Puts the tokenizer's files into a folder."""
    left_out: tuple[str, ...] = ()
    """Modules of a trained model that are no part of the vision-language model."""
    card: str | None = None
    """Text of the model card; None where nothing is known beside the folder itself."""


def export_hf(opened: Exportable, out: Path) -> Mapping[str, Any]:
    """Writes the whole vision-language model for transformers, adapters and new-token rows folded in.

    Args:
        opened: the model; see `inference.open_model`.
        out: folder to create.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: `out` exists, or transformers cannot express the model.
    """
    decoder = opened.model.decoder

    def complete(folder: Path) -> None:
        opened.write_tokenizer(folder)
        if opened.card is not None:
            write_text(folder / CARD, opened.card)

    written = to_hf(opened.model, out, merged=True, complete=complete)
    return {
        "out": str(out),
        "merged_adapter_rank": None if decoder.lora is None else decoder.lora.rank,
        "new_tokens": None if decoder.new_tokens is None else decoder.new_tokens.first_id,
        "untied_head": written.decoder.tie_word_embeddings != decoder.config.tie_word_embeddings,
        "left_out": list(opened.left_out),
    }


def export_peft(opened: Exportable, out: Path) -> Mapping[str, Any]:
    """Writes the adapters for PEFT, and trained new-token rows beside them, which PEFT has no place for.

    Args:
        opened: as in `export_hf`.
        out: folder to create; `new_tokens.safetensors` in it holds the rows under their published names.

    Returns:
        Facts for `--json`.

    Raises:
        CheckpointError: the model has no adapters, or `out` exists.
    """
    lora, new_tokens = opened.model.decoder.lora, opened.model.decoder.new_tokens
    if lora is None:
        raise CheckpointError(f"{opened.base_name} has no adapters; --to hf writes the whole model")

    rows: dict[str, np.ndarray] = {}
    if new_tokens is not None:
        state = dict(nnx.to_flat_state(nnx.state(opened.model, NewTokenParam)))
        rules = new_token_rules(opened.model.config.decoder, new_tokens)
        rows = {rule.source: to_host(state[rule.target][...]) for rule in rules}

    def add_new_tokens(folder: Path) -> None:
        if rows:
            save_tensors(rows, folder / NEW_TOKENS_FILE)

    save_adapter(opened.model, out, base_model=opened.base_name, complete=add_new_tokens)
    return {
        "out": str(out),
        "adapter_rank": lora.rank,
        "new_tokens": None if new_tokens is None else new_tokens.first_id,
        "left_out": list(opened.left_out),
    }


GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "typical_p", "min_p")
"""Fields of a generation config that mean nothing without sampling; transformers warns about them."""


def write_processor(folder: Path, tokenizer: str | None, vlm: VLConfig, beside: Sequence[Path]) -> None:
    """Writes the files of tokenizer and processor into an existing folder.

    Args:
        folder: to write into.
        tokenizer: the run's `data.tokenizer`.
        vlm: the run's vision-language config.
        beside: folders that hold the base's files, the nearest to the run last.

    Raises:
        SpaceDriveError: a file of theirs is damaged, or cannot be written.
    """
    for source in beside:
        copy_tokenizer(source, folder)
    for older in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"):
        # The tokens that the run added are in tokenizer.json alone: these would lack them.
        (folder / older).unlink(missing_ok=True)
    loaded = load_tokenizer(tokenizer, family_of(vlm).chat)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write_part(folder / "tokenizer.json", loaded.tokenizer.to_str(pretty=True))
    _write_tokenizer_config(folder / TOKENIZER_CONFIG, loaded)
    _write_generation(folder / GENERATION, loaded)


def _write_tokenizer_config(file: Path, tokenizer: DrivingTokenizer) -> None:
    """The base's, or a plain one; either ends a turn where the run's answers do."""
    fields = _object(file)
    spelled = {name: tokenizer.tokenizer.id_to_token(number) for name, number in tokenizer.special.items()}
    fields.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    fields["eos_token"] = spelled["turn_end"]
    fields.setdefault("pad_token", spelled["padding"])
    # Where the base lists the added tokens, transformers takes that list and no other: it must be whole.
    known = fields.get("added_tokens_decoder")
    if isinstance(known, dict):
        for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
            known[str(number)] = {"content": token.content} | {
                name: getattr(token, name)
                for name in ("lstrip", "normalized", "rstrip", "single_word", "special")
            }
    file.unlink(missing_ok=True)
    write_json(file, fields, indent=2)


def _write_generation(file: Path, tokenizer: DrivingTokenizer) -> None:
    """The base's, greedy as SpaceDrive answers, stopped by the end of a turn."""
    fields = {name: value for name, value in _object(file).items() if name not in SAMPLING}
    ends = fields.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.turn_end not in ends:
        ends = [tokenizer.turn_end, *ends]
    fields |= {"do_sample": False, "eos_token_id": ends}
    fields.setdefault("pad_token_id", tokenizer.padding)
    file.unlink(missing_ok=True)
    write_json(file, fields, indent=2)


def _object(file: Path) -> dict[str, Any]:
    if not is_there(file):
        return {}
    fields = read_json(file, most=64 * MEBIBYTE)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds no JSON object: fetch the base's files again")
    return fields


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
