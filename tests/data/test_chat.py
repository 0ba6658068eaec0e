import json

import numpy as np
import pytest

from spacedrive_jax.config import load_config
from spacedrive_jax.data.ego_status import insert_ego_tokens
from spacedrive_jax.data.prompts import planning_answer, planning_question
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER, load_tokenizer
from spacedrive_jax.data.transforms import check_vocabulary
from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.family import IGNORE, Message
from tests.conftest import ROOT

ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module")
def toy(golden):
    return load_tokenizer(golden / "prompts" / "tokenizer.json")


@pytest.fixture(scope="module")
def cases(golden):
    return {
        case["name"]: case for case in json.loads((golden / "prompts" / "config.json").read_text())["chat"]
    }


@pytest.mark.parametrize("name", ["plan", "plan_plus_qa", "test", "empty"])
def test_layout_and_labels_equal_published(golden, toy, cases, name):
    case = cases[name]
    published = np.load(golden / "prompts" / "outputs.npz")
    turns = [Message(ROLES[turn["from"]], turn["value"]) for turn in case["conversation"]]
    chat = toy.chat.apply_chat_template(
        toy, turns, case["n_image_tokens"][0], add_generation_prompt=name == "test"
    )
    np.testing.assert_array_equal(chat.token_ids, published[f"{name}/input_ids"])
    labels = published[f"{name}/labels"].copy()
    labels[labels == toy.position] = IGNORE  # the published code masks these when it computes the loss
    np.testing.assert_array_equal(chat.labels, labels)


def test_planning_prompt_equals_published(golden, toy):
    published = np.load(golden / "prompts" / "outputs.npz")
    right = 3
    turns = [
        Message("user", planning_question("boston-seaport", right)),
        Message("assistant", planning_answer()),
    ]
    chat = toy.chat.apply_chat_template(toy, turns, 6)
    np.testing.assert_array_equal(chat.token_ids, published["full/train_default/input_ids"])
    without = [Message("user", planning_question("boston-seaport", None)), turns[1]]
    np.testing.assert_array_equal(
        toy.chat.apply_chat_template(toy, without, 6).token_ids, published["full/train_no_command/input_ids"]
    )
    test = toy.chat.apply_chat_template(toy, turns[:1], 6, add_generation_prompt=True)
    np.testing.assert_array_equal(test.token_ids, published["full/test_planning/input_ids"])
    nothing = [Message("user", planning_question("boston-seaport", right, plan=False))]
    np.testing.assert_array_equal(
        toy.chat.apply_chat_template(toy, nothing, 6).token_ids,
        published["full/train_invalid_mask/input_ids"],
    )


def test_ego_tokens_follow_the_last_image(toy):
    chat = toy.chat.apply_chat_template(toy, [Message("user", planning_question("boston", None))], 4)
    longer, token_type_ids = insert_ego_tokens(toy, chat, "both")
    start = token_type_ids[0] - 2
    end, image, indicator = toy.special["vision_end"], toy.image, toy.indicator
    assert longer.token_ids[start : start + 8] == [end, end, image, end, indicator, image, indicator, image]
    assert [longer.token_ids[slot] for slot in token_type_ids] == [image] * 3
    assert len(longer.labels) == len(longer.token_ids)
    only_positions, token_type_ids = insert_ego_tokens(toy, chat, "positions")
    assert len(token_type_ids) == 2
    assert len(only_positions.token_ids) == len(chat.token_ids) + 4


def test_demo_tokenizer_is_what_its_script_makes():
    from examples.build_tokenizer import build
    from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER

    assert DEMO_TOKENIZER.read_text() == build().to_str(pretty=True) + "\n"


def test_real_vocabulary_gives_the_published_ids():
    from tests.conftest import ROOT

    folder = ROOT.parent / "shared" / "tokenizer"
    if not folder.is_dir():
        pytest.skip("Qwen2.5's vocabulary is not on this machine")
    real = load_tokenizer(folder)
    assert (real.indicator, real.position) == (151665, 151666)
    assert real.encode("<|im_start|>assistant\n") == [151644, 77091, 198]
    assert len(real.encode(planning_answer() + "<|im_end|>\n")) == 31


def test_lengths_that_a_tokenizer_file_sets_do_not_cut_or_fill_texts(tmp_path):
    content = json.loads(DEMO_TOKENIZER.read_text())
    content["truncation"] = dict(direction="Right", max_length=5, strategy="LongestFirst", stride=0)
    content["padding"] = dict(
        **dict(strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None, pad_id=0),
        **dict(pad_type_id=0, pad_token="x"),
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "Please provide the planning trajectory for the ego car without reasons."
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer().encode(text)


def test_ids_beyond_the_model_are_refused_though_ids_below_them_are_free(tmp_path):
    content = json.loads(DEMO_TOKENIZER.read_text())
    words = content["model"]["vocab"]
    model = load_config(str(ROOT / "tests/tiny_config.py")).model
    words[max(words, key=words.get)] = model.vlm.decoder.vocab_size + 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"ids up to {model.vlm.decoder.vocab_size + 3} "):
        check_vocabulary(load_tokenizer(tmp_path), model)
