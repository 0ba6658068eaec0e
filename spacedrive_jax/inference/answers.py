"""Answers: what a generation gives, the frame that is expected, the text and the line of a file.

A file of them appears under its name when it is whole, and is gone on with after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from spacedrive_jax.batch import Leaf
from spacedrive_jax.config import Config, config_changes
from spacedrive_jax.constants import FARTHEST, NUM_WAYPOINTS
from spacedrive_jax.data.prompts import PLANNING_OPENING, context, parse_coordinates, planning_answer
from spacedrive_jax.data.tokenizer import COORDINATE, INDICATOR, POSITION, DrivingTokenizer
from spacedrive_jax.data.transforms import SampleBuilder
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.folders import output_lock
from spacedrive_jax.io import LineFile, is_bucket, put_in_place, read_bytes, twin, write_bytes
from spacedrive_jax.json_files import parse_json, read_json, to_json, write_json
from spacedrive_jax.models.family import Message
from spacedrive_jax.training.hosts import hosts_of_run

PUBLISHED_LIMIT = 100
"""Tokens of an answer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for each sample, on the devices or on the host; G = max_new_tokens + 1."""

    token_ids: Int[Leaf, "B G"]
    """Raw argmax ids, those discarded behind an indicator included; padding behind `lengths`."""
    lengths: Int[Leaf, " B"]
    coordinates: Float[Leaf, "B G 3"]
    """The coordinate decoded at each place that counts, metres, ego frame; zeros elsewhere."""
    is_coordinate: Bool[Leaf, "B G"]
    """Places whose coordinate counts (`coordinate_indices`)."""
    is_position: Bool[Leaf, "B G"]
    """Places behind an indicator that was fed: their id is discarded, the position token or an encoding was
    fed in its stead. In a run of indicators not all of them count."""
    in_one_pass: Bool[Leaf, " B"]
    """The waypoints were answered by the frame alone, without a token-by-token step of its own."""
    waypoints: Float[Leaf, "B T 3"] | None = None
    """Where one token stands for all of them: those decoded at the first coordinate, zeros if there is none;
    metres, ego frame."""


def planning_frame(
    tokenizer: DrivingTokenizer, num_coordinates: int = 6, path_points: int = 0
) -> tuple[int, ...]:
    """The ids of the planning answer as training lays it out, behind the assistant's header.

    A position token stands behind every indicator, the end of the turn comes last (30 ids in Qwen2.5's
    vocabulary, the newline behind the turn not counted).

    Args:
        tokenizer: gives the ids and the chat layout.
        num_coordinates: see `planning_answer`.
        path_points: likewise.

    Raises:
        ConfigError: this tokenizer runs the header and the answer's first letters together, so that an answer
            does not begin where the prompt ends.
    """
    return _answer_ids(tokenizer, planning_answer(num_coordinates, path_points=path_points))


def frame_behind_reasons(tokenizer: DrivingTokenizer, path_points: int = 0) -> tuple[int, ...]:
    """The ids of the planning answer where words stand before it: what all answers end in.

    Args:
        tokenizer: gives the ids and the chat layout.
        path_points: see `planning_answer`.

    Raises:
        ConfigError: this tokenizer runs the words and the answer's first letters together, so that the answer
            depends on the words.
    """
    answer = planning_answer(path_points=path_points)
    first, second = (
        _answer_ids(tokenizer, f"{words} {answer}") for words in ("We stop.", f"A car at {COORDINATE} moves.")
    )
    for start in range(len(first) - 1, -1, -1):
        if tokenizer.decode(list(first[start:])).lstrip().startswith(PLANNING_OPENING):
            if second[start - len(first) :] == first[start:]:
                return first[start:]
            break
    raise ConfigError("the tokenizer merges the words before a plan with the plan: no frame can be made")


def _answer_ids(tokenizer: DrivingTokenizer, text: str) -> tuple[int, ...]:
    question, answer_turn = Message("user", context("boston")), Message("assistant", text)
    apply = tokenizer.chat.apply_chat_template
    prompt = apply(tokenizer, [question], 1, add_generation_prompt=True).token_ids
    whole = apply(tokenizer, [question, answer_turn], 1).token_ids
    if whole[: len(prompt)] != prompt:
        raise ConfigError("the tokenizer merges the assistant's header with the answer: no frame can be made")
    answer = whole[len(prompt) :]
    return tuple(answer[: answer.index(tokenizer.turn_end) + 1])


FIRST_WORDS = "Here is"
"""Of the planning answer: what a reasoning answer must have said before the rest is drafted."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """What is expected of an answer, to be run in one pass and checked (see `one_pass`)."""

    frame: tuple[int, ...]
    """Its ids, a position token behind every indicator, the end of the turn last."""
    opening: int = 0
    """0: the answer is the frame. Else it begins with words of its own, token by token, and once it has said
    the first so many ids of the frame the rest is drafted behind them."""


def expected_draft(config: Config, tokenizer: DrivingTokenizer) -> Draft | None:
    """What every answer of a model of this config is, or ends in; None where that differs from keyframe to
    keyframe (digits, a repeated command).

    Raises:
        ConfigError: see `planning_frame` and `frame_behind_reasons`.
    """
    if config.data.conversation.tasks != "think_before_planning":
        frame = expected_frame(config, tokenizer)
        return None if frame is None else Draft(frame)
    if not config.model.coordinate_tokens or config.data.conversation.command_in_answer:
        return None
    frame = frame_behind_reasons(tokenizer, config.model.path_points)
    said = (tokenizer.decode(list(frame[:count])).lstrip() for count in range(1, len(frame)))
    return Draft(frame, 1 + next(count for count, text in enumerate(said) if text.startswith(FIRST_WORDS)))


def answer_text(
    tokenizer: DrivingTokenizer,
    token_ids: Int[np.ndarray, " G"],
    coordinates: Float[np.ndarray, "G 3"],
    is_coordinate: Bool[np.ndarray, " G"],
    waypoints: Float[np.ndarray, "T 3"] | None = None,
) -> str:
    """One sample's answer as text, each coordinate printed as `(x, y)` with two decimals behind its
    indicator, special tokens spelled out, as the published code writes it.

    It puts position tokens where coordinates count, and the coordinates where the text has position tokens,
    the first at the first: one that the model said itself takes a coordinate from its place. The ids that
    stand in discarded places which do not count are printed as they are.

    Args:
        tokenizer: decodes the ids.
        token_ids: the generated ids, cut to their length.
        coordinates: metres.
        is_coordinate: where they stand.
        waypoints: where one token stands for all of them: printed at the first, an indicator before each and
            nothing between them; what other tokens stand for is not printed.
    """
    text = tokenizer.decode(np.where(is_coordinate, tokenizer.position, token_ids).tolist())
    if waypoints is not None:
        whole = "".join(f"{INDICATOR}({x:.2f}, {y:.2f})" for x, y in waypoints[:, :2].tolist())
        return text.replace(COORDINATE, whole, 1) if is_coordinate.any() else text
    said, *rest = text.split(POSITION)
    printed = [f"({x:.2f}, {y:.2f})" for x, y in coordinates[is_coordinate][:, :2].tolist()]
    filled = printed + [POSITION] * (len(rest) - len(printed))
    return said + "".join(value + piece for value, piece in zip(filled, rest, strict=True))


def answer_limit(config: Config) -> int:
    """Longest answer: the published 100 tokens, and four for every point of a path (indicator, position
    token, comma, and one to spare); where words come before it, as many as training had room for.
    """
    if config.data.conversation.tasks == "think_before_planning":
        return max(PUBLISHED_LIMIT, config.data.max_targets)
    return PUBLISHED_LIMIT + 4 * config.model.path_points


def expected_frame(config: Config, tokenizer: DrivingTokenizer) -> tuple[int, ...] | None:
    """The ids of every answer that a model of this config was taught; None where they differ from keyframe
    to keyframe (digits, a repeated command).
    """
    if not config.model.coordinate_tokens or config.data.conversation.command_in_answer:
        return None
    coordinates = 1 if config.model.decoder.whole_trajectory else NUM_WAYPOINTS
    return planning_frame(tokenizer, coordinates, config.model.path_points)


def prediction_line(builder: SampleBuilder, token: str, generated: Generation, row: int) -> dict[str, Any]:
    """One line of the prediction file; an answer without exactly six waypoints and the path, or with one
    farther than any can be, is `unparsed`. Where words come before the waypoints, they are its `reasons`,
    and an answer without the waypoints' opening is `unparsed`.
    """
    length = int(generated.lengths[row])
    ids, coordinates, is_coordinate = (
        np.asarray(values[row, :length])
        for values in (generated.token_ids, generated.coordinates, generated.is_coordinate)
    )
    whole = None if generated.waypoints is None else np.asarray(generated.waypoints[row])
    text = answer_text(builder.tokenizer, ids, coordinates, is_coordinate, whole)
    reasons, opening, plan = text.rpartition(PLANNING_OPENING) if builder.thinks else ("", "-", text)
    if not opening:
        reasons, plan = text, ""
        waypoints = np.zeros((0, 2))
    elif not builder.model.coordinate_tokens:
        waypoints = parse_coordinates(plan)
    elif builder.thinks:
        # Position tokens that the model said itself stand for nothing.
        said = np.where(is_coordinate, builder.tokenizer.position, ids)
        said = np.where(~is_coordinate & (ids == builder.tokenizer.position), builder.tokenizer.padding, said)
        before, _, _ = builder.tokenizer.decode(said.tolist()).rpartition(PLANNING_OPENING)
        waypoints = coordinates[is_coordinate][before.count(POSITION) :, :2]
    elif whole is not None:
        waypoints = whole[: NUM_WAYPOINTS * bool(is_coordinate.any()), :2]
    else:
        waypoints = coordinates[is_coordinate][:, :2]
    wanted = NUM_WAYPOINTS + builder.model.path_points
    # Digits can be any; a waypoint that none can be would let the whole file be refused by `evaluate`.
    parsed = len(waypoints) == wanted and bool((np.abs(waypoints) <= FARTHEST).all())
    rounded = [[round(float(x), 4), round(float(y), 4)] for x, y in waypoints] if parsed else []
    line = {
        "token": token,
        "waypoints": rounded[:NUM_WAYPOINTS],
        "text": text,
        "status": "ok" if parsed else "unparsed",
    }
    line |= {"reasons": reasons.strip()} if builder.thinks else {}
    return line | ({"path": rounded[NUM_WAYPOINTS:]} if builder.model.path_points else {})


@dataclasses.dataclass
class AnswerFile:
    """An open file of answers, written batch by batch."""

    done: int
    """Answers that an interrupted run left, in whole batches."""
    length: int
    """Tokens that its prompts were cut to (see `generate_batches`); 0 at the start."""
    _lines: LineFile
    _metadata_file: Path
    _metadata: Mapping[str, Any]

    def write(self, lines: Iterable[Mapping[str, Any]], length: int) -> None:
        """Adds the answers of a batch.

        Args:
            lines: one object for each answer; without any, nothing is added.
            length: tokens that the batch's prompts were cut to.
        """
        if length != self.length:
            # Before the answers: a later run that finds these cuts the next batch as this one would.
            self.length = length
            write_json(self._metadata_file, {"metadata": self._metadata, "length": length}, indent=2)
        text = "\n".join(map(to_json, lines))
        if not text:
            return
        try:
            self._lines.write(text)
        except SpaceDriveError as error:
            raise SpaceDriveError(f"{error}; then --resume") from error


@dataclasses.dataclass
class OtherHost:
    """What the hosts that do not write have in place of an `AnswerFile`; the fields mean the same."""

    done: int
    length: int

    def write(self, lines: Iterable[Mapping[str, Any]], length: int) -> None:
        """The first host has the same lines and writes them."""
        self.length = length


@contextlib.contextmanager
def answer_file(
    out: Path, metadata: Mapping[str, Any], *, batch_size: int, resume: bool, overwrite: bool
) -> Iterator[AnswerFile]:
    """Opens a file of answers; `out` appears when the block ends without an error.

    Until then the answers stand in `.NAME.partial` beside it, and what they depend on in
    `.NAME.partial.json`. An interrupted run that is gone on with writes the bytes of one that was not. Where
    `out` is in a bucket, they grow in its twin on this machine (`io.twin`), and `out` is uploaded at the end.

    Args:
        out: file to write.
        metadata: what the answers depend on (JSON values).
        batch_size: answers of a batch; an interrupted run's unfinished last batch is made again.
        resume: go on with an interrupted run, or start where there is none.
        overwrite: replace what is there.

    Raises:
        SpaceDriveError: `out` exists, another job writes it, an interrupted run is there and it is not said
            what to do with it, or it was made of other inputs.
    """
    with output_lock(out):
        if out.exists() and not overwrite:
            what = "is finished: nothing is left to --resume;" if resume else "exists:"
            raise SpaceDriveError(f"{out} {what} give another --out, or --overwrite")
        beside = twin(out) if is_bucket(out) else out
        yield from _answers(out, beside, metadata, batch_size, resume=resume, overwrite=overwrite)


def _answers(
    out: Path, beside: Path, metadata: Mapping[str, Any], batch_size: int, *, resume: bool, overwrite: bool
) -> Iterator[AnswerFile]:
    partial = beside.with_name(f".{out.name}.partial")
    metadata_file = beside.with_name(f".{out.name}.partial.json")
    metadata = json.loads(to_json(metadata))
    kept, length = b"", 0
    begun = metadata_file.is_file() and partial.is_file() and partial.stat().st_size > 0
    if begun and not overwrite:
        if not resume:
            raise SpaceDriveError(
                f"{out} was begun and interrupted: --resume goes on, --overwrite starts anew"
            )
        kept, length = _interrupted(partial, metadata_file, metadata, batch_size)
    write_json(metadata_file, {"metadata": metadata, "length": length}, indent=2)
    write_bytes(partial, kept)
    try:
        with contextlib.closing(LineFile(partial)) as lines:
            yield AnswerFile(kept.count(b"\n"), length, lines, metadata_file, metadata)
    except BaseException:
        if not partial.stat().st_size:  # what failed before its first answer leaves nothing to go on with
            partial.unlink()
            metadata_file.unlink()
        raise
    put_in_place(partial, out)
    metadata_file.unlink()


@contextlib.contextmanager
def answer_file_of_hosts(
    out: Path, metadata: Mapping[str, Any], *, batch_size: int, resume: bool, overwrite: bool
) -> Iterator[AnswerFile | OtherHost]:
    """`answer_file` on the first host of a run; the others learn where it stands and write nothing.

    Raises:
        SpaceDriveError: as `answer_file`; on the other hosts that the first one refused; the hosts have other
            checkpoints or records, or were asked otherwise.
    """
    meant = json.loads(to_json(metadata))
    if isinstance(meant.get("checkpoint"), dict):
        meant["checkpoint"].pop("path", None)  # each host may have a copy of its own
    hosts_of_run().agree(meant | {"batch_size": batch_size, "resume": resume, "overwrite": overwrite})
    opened = answer_file(out, metadata, batch_size=batch_size, resume=resume, overwrite=overwrite)
    if jax.process_count() == 1:
        with opened as file:
            yield file
        return
    if jax.process_index() == 0:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(opened)
            except BaseException:
                multihost_utils.broadcast_one_to_all(np.array([-1, 0], np.int32))
                raise
            multihost_utils.broadcast_one_to_all(np.array([file.done, file.length], np.int32))
            yield file
        return
    done, length = (int(each) for each in multihost_utils.broadcast_one_to_all(np.zeros(2, np.int32)))
    if done < 0:
        raise SpaceDriveError(f"the first host cannot write {out}; it says why")
    yield OtherHost(done, length)


def without_place(metadata: Any) -> Any:
    """What answers were made of, without where the checkpoint lay: a run's folder may move, and its numbers
    are known by their fingerprint. Its config is taken apart, so that what differs can be named.
    """
    checkpoint = metadata.get("checkpoint") if isinstance(metadata, dict) else None
    if not isinstance(checkpoint, dict) or not checkpoint.get("trainable_fingerprint"):
        return metadata
    known = {name: each for name, each in checkpoint.items() if name != "path"}
    if isinstance(known.get("config"), str):
        with contextlib.suppress(DataError):
            known["config"] = parse_json(known["config"], "the checkpoint's config", nan=True)
    return metadata | {"checkpoint": known}


def _interrupted(
    partial: Path, metadata_file: Path, metadata: Mapping[str, Any], batch_size: int
) -> tuple[bytes, int]:
    """The whole batches that an interrupted run wrote, and the length it had come to."""
    saved = read_json(metadata_file)
    if not isinstance(saved, dict) or not isinstance(saved.get("length"), int) or "metadata" not in saved:
        raise DataError(f"{metadata_file} is damaged: --overwrite starts anew")
    changes = config_changes(without_place(saved["metadata"]), without_place(metadata))
    if changes:
        more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise SpaceDriveError(
            f"{partial} was begun otherwise (then -> now): {'; '.join(changes[:6])}{more}. Say the same "
            "again, or --overwrite to start anew"
        )
    lines = read_bytes(partial).splitlines(keepends=True) if partial.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return b"".join(whole[: len(whole) // batch_size * batch_size]), saved["length"]
