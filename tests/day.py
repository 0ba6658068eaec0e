"""A day with weights of one's own: trained, stopped, validated, predicted, scored, shown, given back.

`tests/test_day.py` plays it; `tests/parity/test_day.py` plays it too and opens what comes out with torch.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from flax import nnx

from spacedrive_jax.cli.main import main
from spacedrive_jax.data.tokenizer import DEMO_TOKENIZER
from spacedrive_jax.interop.hf_checkpoint import to_hf
from spacedrive_jax.models.families.qwen2_5_vl import QwenVL, QwenVLConfig
from tests.conftest import ROOT
from tests.tiny_config import config as tiny
from tests.training.runs import make_records

PRESET = """from spacedrive_jax.config import change, load_config

config = change(load_config("demo_published"), "own", {
    "data.image_size": (56, 56), "data.sequence_length": 240, "data.command": "navigation",
    "data.target_points": False, "train.learning_rate": 8e-3, "train.steps": STEPS, "train.batch_size": 4,
    "train.warmup_steps": 4, "train.log_every": 20, "train.checkpoint_every": 4,
    "train.validate_every": 50, "train.validate_keyframes": 4,
})
"""


class Day:
    """Runs commands as a person types them; every one says what it printed."""

    def __init__(self, folder: Path, capsys, steps: int = 100) -> None:
        """Args: where everything lies; pytest's `capsys`; the length of the run."""
        self.folder, self.capsys = folder, capsys
        self.records, self.base = make_records(folder / "records"), folder / "base"
        self.preset, self.run_dir = folder / "own.py", folder / "run"
        self.preset.write_text(PRESET.replace("STEPS", str(steps)))
        self.steps = steps
        write_base(self.base)

    def do(self, *arguments: object) -> dict:
        """A command that must succeed; what `--json` prints."""
        self.capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out.splitlines()[-1])

    def fail(self, *arguments: object) -> str:
        """A command that must fail; its one line."""
        self.capsys.readouterr()
        assert main([*map(str, arguments)]) != 0
        lines = self.capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    @property
    def training(self) -> list[str]:
        """The four flags."""
        flags = ["--model.weights", self.base, "--data.records", self.records, "--run-dir", self.run_dir]
        return ["train", str(self.preset), *map(str, flags)]

    def train(self) -> dict:
        """Mistakes first, then a run that is killed and goes on."""
        without = [*self.training[:2], *self.training[4:], "--model.use-lora", "True"]
        assert "--model.random-base" in self.fail(*without)
        assert "records" in self.fail(*self.training, "--data.records", str(self.folder / "nowhere"))
        assert "--data.sequence-length" in self.fail(*self.training, "--data.sequence-length", "50")
        unlike = self.fail(*self.training, "--model.vlm.decoder.num-layers", "3")
        assert "decoder.num_layers is 2 there and 3 here" in unlike
        assert not self.run_dir.exists()
        seen = self.do(*self.training, "--dry-run")
        assert seen["found"]["keyframes"] == 10
        assert not self.run_dir.exists()
        self._kill()
        assert "--resume" in self.fail(*self.training)
        return self.do(*self.training, "--resume")

    def _kill(self) -> None:
        """Starts the run in a process of its own and takes its machine away."""
        command = [sys.executable, "-m", "spacedrive_jax", *self.training]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        deadline = time.monotonic() + 600
        while not (self.run_dir / "checkpoints" / "4").is_dir():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def predict(self) -> dict:
        """Predictions of the best validated step: a mistake, one keyframe, all of them."""
        predict = ["predict", "--checkpoint", self.run_dir / "best", "--records", self.records]
        assert "no keyframe 'nobody'" in self.fail(*predict, "--token", "nobody")
        few = self.do(*predict, "--limit", 1)
        assert few["samples"] == 1
        whole = self.do(*predict, "--batch-size", 2)
        assert "--overwrite" in self.fail(*predict)
        return whole

    def look(self) -> dict:
        """Scores and the page of the run."""
        assert "give --predictions" in self.fail("evaluate")
        scores = self.do("evaluate", self.run_dir)
        page = Path(self.do("report", self.run_dir)["file"])
        assert "validation" in page.read_text().lower()
        return scores

    def export(self) -> Path:
        """The trained model as transformers has it; a run can start from it again."""
        out = self.folder / "exported"
        assert "nowhere" in self.fail("export-weights", "--to", "hf", self.folder / "nowhere", "--out", out)
        self.do("export-weights", "--to", "hf", self.run_dir / "best", "--out", out)
        assert "exists" in self.fail("export-weights", "--to", "hf", self.run_dir, "--out", out)
        again = [*self.training[:3], str(out), *self.training[4:6], "--run-dir", str(self.folder / "next")]
        assert self.do(*again, "--dry-run")["problems"] == []
        return out


def write_base(folder: Path) -> None:
    """A narrow Qwen2.5-VL in Hugging Face layout, with the released vocabulary where that is at hand."""
    released = ROOT.parent / "shared" / "tokenizer" / "tokenizer.json"
    tokenizer, rows = (released, 151_936) if released.is_file() else (DEMO_TOKENIZER, 512)
    vlm = tiny.model.vlm
    ids = {}
    if rows > 512:
        published = QwenVLConfig.qwen2_5_vl_7b()
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: getattr(published, name) for name in names}
    vlm = dataclasses.replace(vlm, decoder=dataclasses.replace(vlm.decoder, vocab_size=rows), **ids)
    to_hf(QwenVL(vlm, compute=tiny.model.compute, rngs=nnx.Rngs(0)), folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
