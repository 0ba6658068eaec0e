"""What a day's run gives back is what transformers' own model computes and continues."""

import numpy as np
import pytest

from spacedrive_jax import open_model
from tests.day import Day

torch = pytest.importorskip("torch", reason="parity tests need torch")
transformers = pytest.importorskip("transformers")


def test_transformers_loads_what_a_run_gave_back(tmp_path, capsys):
    day = Day(tmp_path, capsys, steps=6)
    day.train()
    out = day.export()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    ids = np.array(
        [tokenizer("Here is the planning trajectory [<POS_INDICATOR><POS_EMBEDDING>")["input_ids"]]
    )
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
        continued = theirs.generate(input_ids=torch.from_numpy(ids), max_new_tokens=3, do_sample=False)
    found = np.asarray(open_model(out).logits(ids), np.float32)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    assert continued[0, ids.shape[1]] == expected[0, -1].argmax()
