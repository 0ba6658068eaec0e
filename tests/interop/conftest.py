from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

FAMILIES = ("qwen_plus_train", "llava_plus_train")


@pytest.fixture
def checkpoint(tmp_path, golden):
    """A copy of a golden checkpoint with a tokenizer that lacks the coordinate tokens: make(name)."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in [*(golden / name).glob("model*"), golden / name / "config.json"]:
            shutil.copyfile(file, folder / file.name)
        write_tokenizer(folder, 510)
        return folder

    return make


def write_tokenizer(folder: Path, size: int) -> None:
    """A vocabulary of `size` words."""
    words = {f"word{number}": number for number in range(size)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))
