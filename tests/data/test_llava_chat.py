import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from spacedrive_jax.data.ego_status import insert_ego_tokens
from spacedrive_jax.data.prompts import planning_answer, planning_question
from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.inference.answers import planning_frame
from spacedrive_jax.models.families.llava import FAMILY, llava_labels
from spacedrive_jax.models.family import IGNORE, Message
from tests.conftest import ROOT

RULES = json.loads((ROOT / "tests" / "golden" / "prompts" / "config.json").read_text())["llava_label_rule"]


@pytest.fixture(scope="module")
def llava(golden, tmp_path_factory):
    tokenizer = Tokenizer.from_file(str(golden / "prompts" / "tokenizer.json"))
    names = ["<s>", "</s>", "<unk>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    path = tmp_path_factory.mktemp("llava") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path, FAMILY.chat)


@pytest.mark.parametrize("name", RULES)
def test_labels_equal_published(name):
    labels = llava_labels(
        RULES[name]["input_ids"],
        user_header=[3148, 1001, 29901],
        assistant_header=[319, 1799, 9047, 13566, 29901],
        image=32000,
    )
    assert labels == RULES[name]["labels"]


def test_layout(llava):
    turns = [
        Message("user", planning_question("boston-seaport", None)),
        Message("assistant", planning_answer()),
        Message("user", "And then?"),
        Message("assistant", "Stop."),
    ]
    chat = llava.chat.apply_chat_template(llava, turns, 3)
    text = llava.decode(chat.token_ids)
    assert text.startswith("<s>USER: " + "<image>" * 18 + "\nYou are driving in boston. ")
    assert text.endswith("].</s>USER: And then? ASSISTANT: Stop.</s>")
    assert chat.image_starts == list(range(chat.image_starts[0], chat.image_starts[0] + 18, 3))
    supervised = [token for token in chat.labels if token != IGNORE]
    assert supervised[0] == llava.special["begin"]  # published, as is the colon behind ASSISTANT
    said = llava.decode(supervised[1:])
    frame = planning_answer().replace("<POS_EMBEDDING>", "")
    assert said == f": {frame}</s>: Stop.</s>"
    assert chat.labels.count(llava.position) == 0


def test_prompt_ends_where_the_answer_begins(llava):
    turns = [Message("user", planning_question("boston", None)), Message("assistant", planning_answer())]
    prompt = llava.chat.apply_chat_template(llava, turns[:1], 2, add_generation_prompt=True)
    assert llava.decode(prompt.token_ids).endswith(" ASSISTANT:")
    whole = llava.chat.apply_chat_template(llava, turns, 2)
    frame = planning_frame(llava)
    assert tuple(whole.token_ids[len(prompt.token_ids) :]) == frame
    assert frame[-1] == llava.turn_end


def test_ego_tokens_follow_the_last_image(llava):
    chat = llava.chat.apply_chat_template(llava, [Message("user", planning_question("boston", None))], 2)
    longer, token_type_ids = insert_ego_tokens(llava, chat, "both")
    start = chat.image_starts[-1] + 2
    image, indicator = llava.image, llava.indicator
    assert longer.token_ids[start : start + 5] == [image, indicator, image, indicator, image]
    np.testing.assert_array_equal(token_type_ids, [start, start + 2, start + 4])


def test_a_qwen_tokenizer_is_refused(golden):
    with pytest.raises(SpaceDriveError, match=r"lacks the special token .* of the model's chat"):
        load_tokenizer(golden / "prompts" / "tokenizer.json", FAMILY.chat)
