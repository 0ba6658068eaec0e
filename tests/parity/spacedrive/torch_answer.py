"""Greedy answering in plain torch, without a cache, written as a case of kind `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tests.parity.spacedrive.case_writer import write_case
from tests.parity.spacedrive.setting import Setting, draw_inputs
from tests.parity.spacedrive.torch_spacedrive import TorchSpaceDrive


def write_answer(
    setting: Setting,
    seed: int,
    folder: Path,
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    insistence: float = 8.0,
    says: tuple[str, ...] = ("pos_indicator",),
) -> Path:
    """Answers one prompt and writes the case; the larger `insistence`, the longer runs of indicators are.

    `says` are names of special ids: what the answer begins with.
    """
    model = TorchSpaceDrive(setting, seed)
    inputs = draw_inputs(setting, model.random)
    # The question alone: everything before the first supervised token.
    count = int((inputs["labels"][0] >= 0).argmax())
    for key in ("input_ids", "labels"):
        inputs[key] = [inputs[key][0][:count]]
    with torch.no_grad():
        incline(model, inputs, insistence, says)
        outputs = answer(model, inputs, max_new_tokens, repetition_penalty)
    overrides = {} if repetition_penalty == 1.0 else {"rp": repetition_penalty}
    facts = {
        "kind": "generate",
        "max_new_tokens": max_new_tokens,
        "variants": {"default": {"overrides": overrides}},
    }
    return write_case(folder, model, inputs, outputs, facts)


def incline(model: TorchSpaceDrive, inputs: dict[str, Any], insistence: float, says: tuple[str, ...]) -> None:
    """Turns each id's row of the head to the state that it shall follow: random rows hardly ever win."""
    frame, ids = model.prepare(inputs), model.setting.ids
    spoken = torch.tensor([ids[name] for name in says[:-1]], dtype=torch.long)
    sequence = torch.cat([frame.sequence, model.embed(spoken)[None]], dim=1)
    start = frame.position_ids.max() + 1
    following = (start + torch.arange(len(spoken))).expand(3, 1, -1)
    positions = torch.cat([frame.position_ids, following], dim=2)
    mask = torch.ones(sequence.shape[:2], dtype=torch.long)
    states = model.language_model(sequence, positions, mask).last_hidden_state[0, -len(says) :]
    # Each row scores at its own state alone.
    rows = insistence * torch.linalg.pinv(states).T
    for name, row in zip(says, rows, strict=True):
        if name.startswith("pos_") and model.setting.family == "qwen":
            model.heads["new_lm_head.weight"][("pos_indicator", "pos_embedding").index(name)] = row
        else:
            model.base["lm_head.weight"][ids[name]] = model.head[ids[name]] = row


def answer(
    model: TorchSpaceDrive, inputs: dict[str, Any], max_new_tokens: int, penalty: float
) -> dict[str, Any]:
    """The published rule: after an indicator is fed, the next id is kept in the output and not fed.

    The position token is fed in its place, or the encoding of the coordinate decoded at the indicator.
    Neither limit nor end is tested on a discarded id. Which coordinates count is read from the ids.
    """
    ids = model.setting.ids
    frame = model.prepare(inputs)
    sequence, position_ids = frame.sequence, frame.position_ids
    seen = set(frame.token_ids[0].tolist())
    generated: list[int] = []
    states, scores, margins, fed, at, points = [], [], [], [], [], []
    fed_places: list[int] = []
    after_indicator = False
    while True:
        mask = torch.ones(sequence.shape[:2], dtype=torch.long)
        hidden = model.language_model(sequence, position_ids, mask).last_hidden_state[0, -1]
        raw = model.logits(hidden)
        penalised = raw.clone()
        if penalty != 1.0:
            known = torch.tensor(sorted(seen))
            penalised[known] = torch.where(raw[known] > 0, raw[known] / penalty, raw[known] * penalty)
        best = penalised.topk(2)
        chosen = int(best.indices[0])
        states.append(hidden)
        scores.append(raw)
        margins.append(float(best.values[0] - best.values[1]))
        generated.append(chosen)
        seen.add(chosen)
        if after_indicator:
            point = model.decode(hidden)
            fed_places.append(len(generated) - 1)
            at.append(hidden)
            points.append(point)
            embedded = model.embed(torch.tensor(ids["pos_embedding"]))
            if model.arguments.get("enable_pe_input"):
                embedded = model.encode(functional.pad(point[:2], (0, 1)))
            after_indicator = False
        else:
            if chosen == ids["im_end"] or len(generated) >= max_new_tokens:
                break
            embedded = model.embed(torch.tensor(chosen))
            after_indicator = chosen == ids["pos_indicator"]
        fed.append(embedded)
        sequence = torch.cat([sequence, embedded[None, None]], dim=1)
        following = position_ids.amax(dim=(0, 2))[None, :, None].expand(3, 1, 1) + 1
        position_ids = torch.cat([position_ids, following], dim=2)
    steps = position_ids[..., frame.position_ids.shape[2] :]
    indices = coordinate_indices(torch.tensor(generated), ids["pos_indicator"])
    by_place = dict(zip(fed_places, zip(at, points, strict=True), strict=True))
    at = [by_place[place][0] for place in indices]
    points = [by_place[place][1] for place in indices]
    return {
        "prompt_ids_after_ego": frame.token_ids,
        "position_ids_prefill": frame.position_ids if model.setting.family == "qwen" else torch.zeros(0),
        "inputs_embeds_prefill": frame.sequence,
        "generated_ids": torch.tensor(generated),
        "hidden_for_output": torch.stack(states),
        "step_logits": torch.stack(scores),
        "top1_top2_margin": torch.tensor(margins),
        "inputs_embeds_steps": torch.stack(fed)[None] if fed else torch.zeros(0),
        "position_ids_steps": steps if model.setting.family == "qwen" else torch.zeros(0),
        "pos_embedding_index": torch.tensor(indices),
        "hidden_at_pos": torch.stack(at) if at else torch.zeros(0, len(states[0])),
        "coords": torch.stack(points) if at else torch.zeros(0, 3),
    }


def coordinate_indices(generated: torch.Tensor, indicator: int) -> list[int]:
    """Behind the first indicator of every run, found by rolling the answer round."""
    is_indicator = generated == indicator
    if is_indicator.sum() > 1:
        is_indicator = is_indicator & ~torch.roll(is_indicator, 1)
    behind = torch.roll(is_indicator, 1)
    behind[0] = False
    return behind.nonzero()[:, 0].tolist()
