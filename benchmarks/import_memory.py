"""Host memory while a checkpoint of Qwen2.5-VL-7B's shape, made of random numbers, is imported and loaded.

Writes the checkpoint (bfloat16, in shards of 4 GB as released), then runs `import-weights` and `vlm.from_hf`
in processes of their own and watches what they own (anonymous memory: pages of mapped files are the kernel's
to drop, and not counted).

    python benchmarks/import_memory.py --work shape7b --layers 28 --load-layers 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from spacedrive_jax.interop.hf_config import write_hf_config
from spacedrive_jax.interop.qwen2_5_vl import FORMAT, qwen_rules
from spacedrive_jax.interop.safetensors_folder import PlannedTensor, plan_shards, write_folder
from spacedrive_jax.models.families.qwen2_5_vl import QwenVLConfig

SHARD_BYTES = 4 * 1000**3


def shaped_like_7b(layers: int) -> QwenVLConfig:
    config = QwenVLConfig.qwen2_5_vl_7b()
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=layers))


def write_random_checkpoint(config: QwenVLConfig, folder: Path) -> int:
    """Writes the checkpoint and returns its size in bytes."""
    generator = np.random.default_rng(0)
    planned = [
        PlannedTensor(FORMAT.hub_name(name), 2 * int(np.prod(rule.source_shape)))
        for rule in qwen_rules(config)
        for name in rule.source_names()
    ]
    shapes = [rule.source_shape for rule in qwen_rules(config) for _ in rule.source_names()]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor, shape in zip(planned, shapes, strict=True):
            # Random bits with the exponent's upper half cut off: finite, of every sign and size below 2.
            bits = np.frombuffer(generator.bytes(tensor.nbytes), np.uint16) & np.uint16(0xBFFF)
            yield tensor.name, bits.view(ml_dtypes.bfloat16).reshape(shape)

    write_folder(folder, tensors(), plan_shards(planned, SHARD_BYTES), config=write_hf_config(config))
    return sum(tensor.nbytes for tensor in planned)


def watch(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its largest anonymous memory in GB and its wall time in seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0.0

    def look() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                peak = max(peak, int(fields["RssAnon"].split()[0]) * 1024 / 1e9)
            except (OSError, KeyError, ValueError):
                return
            time.sleep(0.01)

    started = time.monotonic()
    thread = threading.Thread(target=look)
    thread.start()
    code = process.wait()
    thread.join()
    if code:
        raise SystemExit(f"{command} failed")
    return peak, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for some 35 GB; emptied afterwards")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers of the imported checkpoint")
    parser.add_argument("--load-layers", type=int, default=4, help="decoder layers of the loaded one")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    options.work.mkdir(parents=True)
    try:
        for what, layers in (("import-weights", options.layers), ("from_hf", options.load_layers)):
            if layers == 0:
                continue
            source, out = options.work / "source", options.work / "out"
            size = write_random_checkpoint(shaped_like_7b(layers), source)
            if what == "from_hf":
                code = (
                    "import sys; from spacedrive_jax.interop.hf_checkpoint import from_hf; "
                    "from_hf(sys.argv[1])"
                )
                command = [sys.executable, "-c", code, str(source)]
            else:
                arguments = ["--from", "hf", str(source), "--out", str(out), "--no-add-tokens"]
                command = [sys.executable, "-m", "spacedrive_jax", "import-weights", *arguments]
            peak, seconds = watch(command)
            largest = 2 * layers * 18944 * 3584 / 1e9
            results[what] = {
                "layers": layers,
                "checkpoint_gb": round(size / 1e9, 2),
                "peak_gb": round(peak, 2),
                "peak_beyond_parameters_gb": round(peak - (size / 1e9 if what == "from_hf" else 0), 2),
                "largest_stacked_parameter_gb": round(largest, 2),
                "seconds": round(seconds, 1),
            }
            print(json.dumps({what: results[what]}), flush=True)
            shutil.rmtree(source)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
