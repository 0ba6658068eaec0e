"""Trajectories for a whole split: a checkpoint and records in, JSON Lines out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from spacedrive_jax.console import progress
from spacedrive_jax.data.depth_sources import with_network_depth
from spacedrive_jax.data.loader import Samples
from spacedrive_jax.data.records import open_records
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.inference.answers import (
    answer_file_of_hosts,
    answer_limit,
    expected_frame,
    prediction_line,
)
from spacedrive_jax.inference.batches import Asking, answered_batches
from spacedrive_jax.inference.open_model import name_checkpoint, open_config, open_trained_model
from spacedrive_jax.training.sharding import check_batch_size, mesh_here

Decoding = Literal["one-pass", "token-by-token"]
"""How answers are generated: the whole framed answer in one forward, falling back where a sample leaves the
frame, or one token after the other. Both give the same answers."""


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """What was written."""

    file: Path
    samples: int
    """Answered by this call; a resumed one counts what was left."""
    unparsed: int
    """Answers without exactly six waypoints."""
    in_one_pass: int
    """Answers that needed no token-by-token step."""
    seconds: float
    """From the second batch on, so that compiling does not count; all of it if there is but one."""


def predict(
    checkpoint: Path,
    records_dir: Path,
    split: str,
    out: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    decoding: Decoding = "one-pass",
    repetition_penalty: float = 1.0,
    average: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> PredictResult:
    """Predicts every keyframe of a split.

    Args:
        checkpoint: see `open_trained_model`.
        records_dir: records folder.
        split: `train`, `val` or `all`.
        out: JSON Lines file: token, waypoints (6 x [x, y], metres, ego frame), text, status, and path (R x
            [x, y]) where the model gives one.
        batch_size: samples a step; the last batch is filled up.
        max_new_tokens: longest answer; None for `answer_limit`.
        decoding: how; it changes the time, not the answers.
        repetition_penalty: see `generate`; 1 for none.
        average: predict with the moving average of the weights instead of the last ones.
        resume: go on with an interrupted prediction, see `answer_file`.
        overwrite: replace `out`.
        mesh: to predict on; None for `mesh_here`. On several hosts each prepares its share and the first
            writes the file.

    Raises:
        SpaceDriveError: something is missing, the run keeps no average, or `out` exists or was begun
            otherwise.
    """
    config = open_config(checkpoint)
    mesh = mesh_here(config.mesh) if mesh is None else mesh
    check_batch_size(batch_size, mesh)
    builder = SampleBuilder(config.data, config.model, answer=False)
    records = open_records(records_dir, split)
    records = with_network_depth(records, config.data.depth, builder.images.token_grid)
    limit = answer_limit(config) if max_new_tokens is None else max_new_tokens
    frame = expected_frame(config, builder.tokenizer) if decoding == "one-pass" else None
    asking = Asking(batch_size, limit, repetition_penalty, frame)
    metadata = {
        "checkpoint": name_checkpoint(checkpoint),
        "records": records.fingerprint,
        "split": split,
        "average": average,
        "asking": dataclasses.asdict(asking),
    }
    unparsed, in_one_pass, timed = 0, 0, 0
    with answer_file_of_hosts(
        out, metadata, batch_size=batch_size, resume=resume, overwrite=overwrite
    ) as file:
        samples = Samples(records, builder, list(range(file.done, len(records))))
        trained = open_trained_model(checkpoint, average=average, mesh=mesh)
        started = time.monotonic()
        with progress(total=len(records), initial=file.done, desc=f"predict {split}", unit="sample") as bar:
            answers = answered_batches(trained, samples, builder.tokenizer, asking, length=file.length)
            for number, answered in enumerate(answers):
                count, generated = answered.count, answered.generated
                in_one_pass += int(generated.in_one_pass[:count].sum())
                indices = samples.indices[answered.first : answered.first + count]
                lines = [
                    prediction_line(builder, records[index]["token"], generated, row)
                    for row, index in enumerate(indices)
                ]
                unparsed += sum(line["status"] != "ok" for line in lines)
                file.write(lines, answered.length)
                bar.update(count)
                if number == 0 and len(samples) > count:
                    started = time.monotonic()
                else:
                    timed += count
    seconds = (time.monotonic() - started) * len(samples) / max(timed, 1)
    return PredictResult(out, len(samples), unparsed, in_one_pass, seconds)
