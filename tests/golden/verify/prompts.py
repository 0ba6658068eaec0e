"""Texts, chat layouts, labels, prompts and image processing against recorded ones: kind `prompts`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spacedrive_jax.constants import NUM_WAYPOINTS
from spacedrive_jax.data.conversation import ConversationConfig, training_conversation
from spacedrive_jax.data.images import scaled_intrinsics
from spacedrive_jax.data.prompts import (
    COMMAND_WORDS,
    CommandSource,
    counterfactual_question,
    format_coordinates,
    format_number,
    planning_question,
    replace_coordinates,
)
from spacedrive_jax.data.schema import Record
from spacedrive_jax.data.tokenizer import COORDINATE, DrivingTokenizer, load_tokenizer
from spacedrive_jax.errors import DataError
from spacedrive_jax.models.families.llava import llava_labels
from spacedrive_jax.models.families.qwen2_5_vl import QwenImageProcessor, QwenVisionConfig, smart_resize
from spacedrive_jax.models.family import IGNORE, ChatTokens, Message
from spacedrive_jax.models.image_processor import normalise
from tests.golden.verify.case_files import read_arrays, read_settings
from tests.golden.verify.check import Check, compare

ROLES = {"human": "user", "gpt": "assistant"}
LLAMA_USER, LLAMA_ASSISTANT, LLAMA_IMAGE = [3148, 1001, 29901], [319, 1799, 9047, 13566, 29901], 32000
"""Real Llama ids of `USER:`, `ASSISTANT:` and the image token."""
PROCESSED = 336
"""Pixels on a side of LLaVA's images."""


def verify_prompts(folder: Path) -> list[Check]:
    """Checks a case of kind `prompts`.

    Raises:
        DataError: a file of the case is missing or damaged.
    """
    settings, outputs = read_settings(folder), read_arrays(folder / "outputs.npz")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    checks = _token_ids(settings.get("token_ids", {}), tokenizer)
    checks += _coordinates_in_text(settings.get("convert_coords", []))
    checks += _numbers(settings.get("format_number", []))
    for conversation in settings.get("chat", []):
        checks += _chat(conversation, tokenizer, outputs)
    if "full_transform" in settings:
        inputs = settings["full_transform_inputs"]
        for name, expected in settings["full_transform"].items():
            checks += _full(name, expected, inputs, tokenizer, outputs)
    for name, rule in settings.get("llava_label_rule", {}).items():
        labels = llava_labels(
            rule["input_ids"], user_header=LLAMA_USER, assistant_header=LLAMA_ASSISTANT, image=LLAMA_IMAGE
        )
        checks.append(_equal(f"llava_label_rule/{name}", labels, rule["labels"]))
    return checks + _images(settings, outputs)


def _equal(name: str, actual: Any, expected: Any) -> Check:
    return compare(name, np.asarray(actual), np.asarray(expected), rtol=0)


def _token_ids(ids: dict[str, int], tokenizer: DrivingTokenizer) -> list[Check]:
    ours = {
        "im_start": tokenizer.special["turn_start"],
        "im_end": tokenizer.turn_end,
        "vision_start": tokenizer.special["vision_start"],
        "vision_end": tokenizer.special["vision_end"],
        "image_pad": tokenizer.image,
        "pad": tokenizer.padding,
        "pos_indicator": tokenizer.indicator,
        "pos_embedding": tokenizer.position,
    }
    return [_equal(f"token_ids/{name}", ours[name], value) for name, value in ids.items() if name in ours]


def _coordinates_in_text(rows: list[dict[str, Any]]) -> list[Check]:
    checks = []
    for index, row in enumerate(rows):
        for rule in ("train", "test"):
            ours = replace_coordinates(row["text"], keep_velocities=rule == "train")
            name = f"convert_coords/{index}/{rule}"
            expected = np.array(row[rule]["coords"], np.float32).reshape(-1, 2)
            checks += [
                _equal(f"{name}/text", ours.text, row[rule]["text"]),
                _equal(f"{name}/coords", ours.coordinates, expected),
            ]
    return checks


def _numbers(rows: list[dict[str, Any]]) -> list[Check]:
    names = {"d1": 1, "d2": 2, "model_d2": 2}
    return [
        _equal(
            f"format_number/{name}",
            [format_number(row["n"], decimals) for row in rows],
            [row[name] for row in rows],
        )
        for name, decimals in names.items()
        if rows
    ]


def _chat(
    conversation: dict[str, Any], tokenizer: DrivingTokenizer, outputs: dict[str, np.ndarray]
) -> list[Check]:
    name = conversation["name"]
    turns = [Message(ROLES[turn["from"]], turn["value"]) for turn in conversation["conversation"]]  # type: ignore[arg-type]
    chat = tokenizer.chat.apply_chat_template(
        tokenizer,
        turns,
        conversation["n_image_tokens"][0],
        add_generation_prompt=conversation.get("add_generation_prompt", False),
    )
    text = _equal(f"chat/{name}/text", tokenizer.decode(chat.token_ids), conversation["decoded"])
    return [text, *_ids_and_labels(name, chat, tokenizer, outputs)]


def _ids_and_labels(
    name: str, chat: ChatTokens, tokenizer: DrivingTokenizer, outputs: dict[str, np.ndarray]
) -> list[Check]:
    checks = [_equal(f"{name}/input_ids", chat.token_ids, outputs[f"{name}/input_ids"])]
    if f"{name}/labels" in outputs:
        # The published code masks position tokens where it computes the loss, ours beforehand.
        labels = outputs[f"{name}/labels"].copy()
        labels[labels == tokenizer.position] = IGNORE
        checks.append(_equal(f"{name}/labels", chat.labels, labels))
    return checks


def _full(
    name: str,
    expected: dict[str, Any],
    inputs: dict[str, Any],
    tokenizer: DrivingTokenizer,
    outputs: dict[str, np.ndarray],
) -> list[Check]:
    """The whole way from a keyframe to ids, with the options that the entry's name says."""
    merge, (_, rows, columns) = inputs["merge"], inputs["grid"]
    coordinates = outputs[f"full/{name}/coords_pos"]
    command = _command(inputs["command_desc"])
    record: Record = {
        "token": name,
        "location": inputs["location"],
        "command_released": command,
        "waypoints": np.array(inputs["traj"], np.float32),
        "waypoint_mask": np.full(NUM_WAYPOINTS, expected["has_gt_planning"] is not False),
    }
    if name.startswith("test"):
        if "counter" in name:
            trajectory = _spell_out(expected["decoded"], coordinates)
            question = counterfactual_question(inputs["location"], trajectory)
        else:
            question = planning_question(inputs["location"], command)
        text, found = replace_coordinates(question, keep_velocities=False)
        turns = [Message("user", text)]
    else:
        source: CommandSource = "none" if "no_command" in name else "released"
        tokens = None if "text_coords" in name else 1 if "single_token" in name else NUM_WAYPOINTS
        config = ConversationConfig(command_in_answer="high_level_command" in name)
        talk = training_conversation(record, config, source, coordinate_tokens=tokens)
        turns, found = talk.turns, talk.coordinates
        if tokens == 1:  # the one token stands for the whole trajectory
            found = record["waypoints"]
    chat = tokenizer.chat.apply_chat_template(
        tokenizer, turns, rows * columns // merge**2, add_generation_prompt=name.startswith("test")
    )
    return [
        _equal(f"full/{name}/text", tokenizer.decode(chat.token_ids), expected["decoded"]),
        compare(f"full/{name}/coords", found, coordinates, atol=1e-6),
        *_ids_and_labels(f"full/{name}", chat, tokenizer, outputs),
    ]


def _command(sentence: str) -> int:
    """The command that a recorded sentence names.

    Raises:
        DataError: none of the published words.
    """
    for index, words in enumerate(COMMAND_WORDS):
        if sentence.strip() == f"The ego vehicle is {words}.":
            return index
    raise DataError(f"{sentence!r} names none of the commands {', '.join(COMMAND_WORDS)}")


def _spell_out(decoded: str, coordinates: np.ndarray) -> str:
    """The recorded trajectory with digits for its tokens: what the question was made from."""
    found = re.search(r"If you follow the trajectory (.*), what would happen\?", decoded)
    if found is None:
        raise DataError(f"no counterfactual question in {decoded[-200:]!r}")
    digits = iter(format_coordinates(coordinates[index : index + 1]) for index in range(len(coordinates)))
    return re.sub(COORDINATE, lambda _: next(digits), found[1])


def _images(settings: dict[str, Any], outputs: dict[str, np.ndarray]) -> list[Check]:
    checks = []
    limits = settings.get("imgproc", {})
    most = QwenImageProcessor.published.sizes["longest_edge"]
    for case in settings.get("smart_resize", []):
        size = smart_resize(*case["hw"], factor=28, min_pixels=limits["min_pixels"], max_pixels=most)
        checks.append(_equal(f"smart_resize/{'x'.join(map(str, case['hw']))}", size, case["out"]))
    for key in sorted(outputs):
        if key.startswith("imgproc/") and key.endswith("/image"):
            name, image = key.removesuffix("/image"), outputs[key]
            processor = QwenImageProcessor(QwenVisionConfig(), image.shape[:2])
            patches = normalise(jnp.asarray(processor.patches([image])[0]))
            checks += [
                _equal(f"{name}/grid", [(1, *processor.patch_grid)], outputs[f"{name}/grid"]),
                compare(f"{name}/pixel_values", patches, outputs[f"{name}/pixel_values"], atol=1e-5),
            ]
    if "llava_intr/K640" in outputs:
        native = outputs["llava_intr/K640"][:, :3, :3]
        record = {"camera_intrinsics": native, "image_size": np.full((len(native), 2), 640)}
        intrinsics = scaled_intrinsics(record, (PROCESSED, PROCESSED))
        checks.append(
            compare("llava_intr/K336", intrinsics, outputs["llava_intr/K336"][:, :3, :3], rtol=1e-6)
        )
        extrinsics = outputs["llava_intr/extrinsics"]
        projection = intrinsics @ extrinsics[:, :3]
        checks.append(
            compare("llava_intr/lidar2img", projection, outputs["llava_intr/lidar2img"][:, :3], rtol=1e-5)
        )
    return checks
