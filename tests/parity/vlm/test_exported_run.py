"""A run exported for transformers says there what it says here, and stops where it should."""

import json

import numpy as np
import pytest

from spacedrive_jax.interop.hf_checkpoint import from_hf
from tests.interop.test_export_processor import base, exported

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
__all__ = ["base", "exported"]
"""Fixtures of the tests that need no torch."""

NEW_TOKENS = 12


def test_transformers_generates_the_same_ids(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert theirs.generation_config.eos_token_id == ends
    assert not theirs.generation_config.do_sample
    prompt = "<|im_start|>user\nDrive on.<|im_end|>\n<|im_start|>assistant\n"
    ids = np.asarray([tokenizer(prompt)["input_ids"]], np.int32)
    with torch.no_grad():
        answer = theirs.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.ones(ids.shape),
            max_new_tokens=NEW_TOKENS,
        )
    expected = answer[0, ids.shape[1] :].numpy()
    found = from_hf(exported).generate(ids, max_new_tokens=NEW_TOKENS, stop_ids=tuple(ends))[0]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert len(set(expected.tolist())) > 1, "an answer that repeats one id shows little"
