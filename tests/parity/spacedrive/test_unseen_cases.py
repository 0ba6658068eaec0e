"""Cases nobody recorded: other widths, batches, clocks, views, options; against torch with autograd."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity tests need torch")

from tests.golden.verify.runner import verify_case
from tests.parity.spacedrive.setting import Setting
from tests.parity.spacedrive.torch_answer import write_answer
from tests.parity.spacedrive.torch_step import Step

pytestmark = pytest.mark.parity

CLOCK = 1531883561.449377
"""A real timestamp: float32 holds it to 128 s."""
SETTINGS = {
    "width_80": Setting(),
    "width_72_batch_3_one_without_future": Setting(width=72, kv_heads=1, batch=3, without_future=(1,)),
    "real_clock_second_frame": Setting(times=(CLOCK, CLOCK + 0.5)),
    "real_clock_third_frame": Setting(times=(CLOCK, CLOCK + 0.5, CLOCK + 1.0)),
    "fourth_frame": Setting(times=(50.0, 50.5, 51.0, 51.5)),
    "gap_before_the_last_but_one": Setting(times=(50.0, 52.5, 53.0)),
    "one_frame": Setting(times=(50.0,)),
    "three_views_other_vocabulary": Setting(views=3, vocabulary=640, rank=8),
    "past_positions_only": Setting(grid=(6, 10), arguments={"ego_status": "PE"}),
    "feature_only": Setting(grid=(10, 4), arguments={"ego_status": "feature"}),
    "no_ego": Setting(batch=2, arguments={"ego_status": ""}),
    "fone_linear_l1": Setting(
        arguments={
            "pe_type": "fone",
            "pe_freq_coeff": 2,
            "pe_freq_scaling": 0.02,
            "fone_dim": 36,
            "pe_decode_method": "l2_coords_mlp",
            "loss_pos_type": "l1",
        }
    ),
    "nerf_l2_fixed_scale": Setting(
        arguments={
            "pe_type": "nerf",
            "pe_freq_coeff": 2,
            "loss_pos_type": "l2",
            "learnable_pe_scaling": False,
            "pe_scaling": 0.03,
        }
    ),
    "all_coordinates_batch_2": Setting(
        batch=2, reply_points=30, arguments={"planning_only": False, "loss_pos_lambda": 0.5}
    ),
    "no_row_has_a_future": Setting(batch=2, without_future=(0, 1)),
    "cosine": Setting(arguments={"pe_decode_method": "cosine"}),
    "embedding_l2_no_visual_positions": Setting(arguments={"pe_decode_method": "l2", "vis_3d_pos": False}),
    "llava": Setting("llava", width=96, kv_heads=4, grid=(3, 3)),
    "llava_batch_2_width_72": Setting("llava", width=72, kv_heads=2, grid=(4, 4), batch=2, vocabulary=600),
    "llava_real_clock_no_visual_positions": Setting(
        "llava", kv_heads=4, grid=(3, 3), times=(CLOCK, CLOCK + 0.5), arguments={"vis_3d_pos": False}
    ),
    "llava_cosine_one_without_future": Setting(
        "llava",
        kv_heads=4,
        grid=(3, 3),
        batch=2,
        without_future=(0,),
        arguments={"pe_decode_method": "cosine", "pe_freq_coeff": 500, "huber_delta": 2.0},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_step_equals_torch(name, tmp_path):
    case = Step(SETTINGS[name], seed=len(name)).write(tmp_path / name)
    checks = verify_case(case)
    compared = {check.name for check in checks}
    assert {"losses/total", "losses/loss_pos", "logits", "hidden_states/2", "labels_for_ce"} <= compared
    assert sum(check.name.startswith("grad/") for check in checks) >= 14
    failed = [(check.name, check.absolute, check.relative) for check in checks if not check.passed]
    assert failed == []


ANSWERS = {
    "width_80": (Setting(), 1.0),
    "width_72_three_views_real_clock": (
        Setting(width=72, kv_heads=1, views=3, vocabulary=640, times=(CLOCK, CLOCK + 0.5, CLOCK + 1.0)),
        1.0,
    ),
    "position_input": (Setting(arguments={"enable_pe_input": True, "ego_status": "PE"}), 1.0),
    "penalty": (Setting(grid=(6, 10), arguments={"ego_status": ""}), 1.3),
    "llava_position_input": (
        Setting("llava", width=72, kv_heads=4, grid=(3, 3), arguments={"enable_pe_input": True}),
        1.1,
    ),
}


RUNS = {  # family, position input, seed, how much the head leans to indicators, ids asked for
    "long_runs": ("qwen", False, 7, 5, 24),
    "runs_of_one_two_and_three": ("qwen", False, 7, 4, 24),
    "runs_with_position_input": ("qwen", True, 7, 5, 24),
    "over_the_limit": ("qwen", True, 6, 6, 24),
    "nothing_else": ("qwen", False, 5, 40, 20),
    "nothing_else_and_one_id_more": ("qwen", True, 5, 40, 21),
    "one_id": ("qwen", False, 5, 40, 1),
    "llava": ("llava", False, 6, 4, 24),
    "llava_with_position_input": ("llava", True, 6, 4, 24),
    "llava_nothing_else": ("llava", False, 5, 40, 20),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_indicators_equal_torch(name, tmp_path):
    family, position_input, seed, insistence, limit = RUNS[name]
    shape = {"kv_heads": 2, "grid": (4, 6)} if family == "qwen" else {"kv_heads": 4, "grid": (3, 3)}
    setting = Setting(family, arguments={"enable_pe_input": position_input}, **shape)
    case = write_answer(setting, seed, tmp_path / name, max_new_tokens=limit, insistence=insistence)
    checks = verify_case(case)
    assert {"default/pos_embedding_index", "default/coords"} <= {check.name for check in checks}
    assert [check for check in checks if not check.passed] == []


BEGINNINGS = {  # what the answer says first, and the penalty on what was said
    "ends_at_once": (("im_end",), 1.0),
    "end_behind_an_indicator_is_thrown_away": (("pos_indicator", "im_end"), 1.3),
    "position_token_of_its_own": (("pos_embedding", "pos_indicator"), 1.0),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_beginning_equals_torch(name, tmp_path):
    says, penalty = BEGINNINGS[name]
    case = write_answer(
        Setting(),
        5,
        tmp_path / name,
        max_new_tokens=12,
        repetition_penalty=penalty,
        insistence=20,
        says=says,
    )
    settings = json.loads((case / "config.json").read_text())
    generated = np.load(case / "outputs.npz")["generated_ids"]
    assert generated[: len(says)].tolist() == [settings["token_ids"][each] for each in says]
    assert (len(generated) == 1) == (name == "ends_at_once")
    checks = verify_case(case)
    assert "default/generated_ids" in {check.name for check in checks}
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_equals_torch(name, tmp_path):
    setting, penalty = ANSWERS[name]
    case = write_answer(setting, len(name), tmp_path / name, max_new_tokens=16, repetition_penalty=penalty)
    checks = verify_case(case)
    compared = {check.name for check in checks}
    assert {"default/generated_ids", "default/coords", "default/step_logits"} <= compared
    failed = [(check.name, check.absolute, check.relative) for check in checks if not check.passed]
    assert failed == []
