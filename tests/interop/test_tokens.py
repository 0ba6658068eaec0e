from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from spacedrive_jax.data.tokenizer import load_tokenizer
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.interop.importing import extend_tokenizer, with_mean_rows
from tests.interop.conftest import write_tokenizer


@pytest.mark.parametrize(("size", "indicator"), [(151665, 151665), (32002, 32002)], ids=["qwen", "llava"])
def test_vocabularies_of_the_released_sizes_get_the_published_ids(tmp_path, size, indicator):
    write_tokenizer(tmp_path, size)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text('{"word7": 7}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    target = tmp_path / "extended"
    target.mkdir()
    assert extend_tokenizer(tmp_path, target) == (indicator, True)
    assert (target / "generation_config.json").read_text() == "{}"
    ids = {"<POS_INDICATOR>": indicator, "<POS_EMBEDDING>": indicator + 1}
    assert json.loads((target / "added_tokens.json").read_text()) == {"word7": 7, **ids}
    listed = json.loads((target / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in listed.items()} == ids
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size + 2
    assert tokenizer.encode("word5<POS_INDICATOR><POS_EMBEDDING>").ids == [5, indicator, indicator + 1]
    again = tmp_path / "again"
    again.mkdir()
    assert extend_tokenizer(target, again) == (indicator, False)


def test_the_extended_tokenizer_serves_the_data_pipeline(tmp_path, golden):
    target = tmp_path / "extended"
    target.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    text = (golden / "prompts" / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text)
    extend_tokenizer(source, target)
    before, after = load_tokenizer(source), load_tokenizer(target)
    assert after == type(after)(**{**vars(before), "tokenizer": after.tokenizer})
    sentence = "<|im_start|>Here is it: <POS_INDICATOR><POS_EMBEDDING>."
    assert after.encode(sentence) == before.encode(sentence)


def test_no_tokenizer_is_an_error_unless_nothing_is_added(tmp_path):
    with pytest.raises(SpaceDriveError, match="--no-add-tokens"):
        extend_tokenizer(tmp_path, tmp_path)
    assert extend_tokenizer(tmp_path, tmp_path, add=False) == (None, False)


def test_ids_that_are_not_in_a_row_are_refused(tmp_path):
    write_tokenizer(tmp_path, 5)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<POS_EMBEDDING>", "<POS_INDICATOR>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "target").mkdir()
    with pytest.raises(SpaceDriveError, match="not the next one"):
        extend_tokenizer(tmp_path, tmp_path / "target")


@pytest.mark.parametrize("rows", [8, 4, 5])
def test_new_rows_are_the_mean_of_those_before_and_spare_rows_stay(rows):
    table = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3).astype(ml_dtypes.bfloat16)
    extended = with_mean_rows(table, 4, 2)
    assert extended.dtype == table.dtype
    assert extended.shape == (max(rows, 6), 3)
    np.testing.assert_array_equal(extended[:4], table[:4])
    np.testing.assert_array_equal(extended[6:], table[6:])
    np.testing.assert_array_equal(extended[4:6].astype(np.float32), [[4.5, 5.5, 6.5]] * 2)
