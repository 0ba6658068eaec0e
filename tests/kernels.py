"""Proves that bits and decisions do not depend on the processor: `make kernels`, a minute or two.

A small world is synthesized, converted, evaluated and driven in anew under every setting that makes this
processor compute like another (OpenBLAS's kernels, NumPy's, OpenCV's, the C library's), and under other hash
seeds, locales, time zones and thread counts; every fingerprint must be the one of the plain run. Then the
tests of what decides something run with XLA restricted to older instruction sets and all else to its oldest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

ROOT = Path(__file__).resolve().parents[1]
MACHINE = platform.machine()

BLAS_KERNELS = {
    "x86_64": (
        *("Prescott", "Core2", "Nehalem", "Sandybridge", "Haswell", "SkylakeX", "Cooperlake"),
        *("SapphireRapids", "Barcelona", "Bulldozer", "Excavator", "Zen"),
    ),
    "aarch64": ("ARMV8", "CORTEXA57", "NEOVERSEN1", "NEOVERSEV1", "NEOVERSEN2", "ARMV8SVE"),
}.get(MACHINE, ())
OLDEST = (
    {
        "OPENCV_IPP": "disabled",
        "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX512-ICL,AVX2,FMA3,FP16,AVX,SSE4.2,SSE4.1,SSSE3",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4",
    }
    if MACHINE == "x86_64"
    else {}
)
"""What takes OpenCV's newer kernels, Intel's and the C library's fused multiply-add away."""
XLA_KERNELS = ("AVX2", "SSE4_2") if MACHINE == "x86_64" else ()

DECISIONS = [
    "tests/test_exact.py",
    "tests/data/test_commands.py",
    "tests/data/test_path.py",
    "tests/evaluation/test_golden_metrics.py",
    "tests/evaluation/test_breakdown.py",
    "tests/evaluation/test_polygons.py",
    "tests/evaluation/test_bench2drive.py",
    "tests/models/test_patch_depth.py",
    "tests/models/test_unprojection.py",
    "tests/models/test_grid.py",
    "tests/models/test_sincos.py",
    "tests/models/test_encoders.py",
]
"""Tests of outcomes that a last bit could turn."""

Setting = dict[str, str]


def numpy_settings() -> Iterator[Setting]:
    """NumPy without its newest dispatched features, one more left out each time."""
    known = [feature for feature in __cpu_dispatch__ if __cpu_features__[feature]]
    for kept in reversed(range(len(known))):
        yield {"NPY_DISABLE_CPU_FEATURES": " ".join(known[kept:])}


def blas_settings() -> Iterator[Setting]:
    """OpenBLAS with each kernel that runs here."""
    probe = "import numpy as np; a = np.random.rand(96, 96); np.linalg.inv(a @ a.T + np.eye(96)); a[0] @ a[1]"
    for kernel in BLAS_KERNELS:
        setting = {"OPENBLAS_CORETYPE": kernel}
        command = [sys.executable, "-c", probe]
        if subprocess.run(command, env=os.environ | setting, capture_output=True).returncode == 0:
            yield setting


def settings() -> list[Setting]:
    """All of them; kinds that have nothing to do with each other share a run."""
    surroundings = [
        {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "1", "LC_ALL": "POSIX", "TZ": "America/St_Johns", "OPENBLAS_NUM_THREADS": "3"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "UTC-14"},
    ]
    columns = [list(blas_settings()), list(numpy_settings()), [{}, OLDEST], surroundings]
    rows = [
        {name: value for part in row for name, value in part.items()}
        for row in itertools.zip_longest(*columns, fillvalue={})
    ]
    oldest = {**(columns[0] or [{}])[0], **(columns[1] or [{}])[-1], **OLDEST}
    return [{}, *rows, oldest]


def measure() -> dict[str, str]:
    """Fingerprints of a world, its records, their evaluation and a drive under this process's setting."""
    from data_prep.cli import Convert, Synthesize
    from spacedrive_jax.cli.evaluate import Evaluate
    from spacedrive_jax.data.records import open_records
    from spacedrive_jax.driving.drive import drive_all
    from spacedrive_jax.driving.episode import DriveOptions
    from spacedrive_jax.driving.policies import constant_velocity as constant_velocity_in_world
    from spacedrive_jax.driving.scenarios import DriveSpec
    from spacedrive_jax.evaluation.predictions import constant_velocity

    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world, records = root / "world", root / "records"
        made = Synthesize(out=world, scenes=1, keyframes=9, image_size="96x54", workers=1).run()
        results["world"] = made["fingerprint"]
        # Half the images are drawn anew from annotations and map.
        for picture in sorted(world.glob("samples/CAM_BACK*/*.jpg")):
            picture.unlink()
        converted = Convert(
            dataroot=world, version="v1.0-synthetic", out=records, missing_images="render"
        ).run()
        results["records"] = converted["fingerprint"]
        # No view has this size: each is decoded, resized and encoded.
        kept = Convert(dataroot=world, version="v1.0-synthetic", out=root / "kept", missing_images="render")
        results["resized views"] = dataclasses.replace(kept, image_size="40x64").run()["fingerprint"]
        split = open_records(records, "all")
        file = root / "predictions.jsonl"
        with file.open("w") as lines:
            for index in range(len(split)):
                record = split[index]
                plan = (constant_velocity(record) * 1.1).tolist()
                answer = {"token": record["token"], "waypoints": plan, "text": "", "status": "ok"}
                lines.write(json.dumps(answer) + "\n")
        results["plans"] = hashlib.sha256(file.read_bytes()).hexdigest()
        for protocol in ("omnidrive", "vad", "uniad", "corrected"):
            Evaluate(predictions=file, records=records, split="all", protocol=protocol, workers=1).run()  # type: ignore[arg-type]
            scores: dict[str, Any] = json.loads((root / f"predictions.{protocol}.json").read_text())
            text = json.dumps(scores, sort_keys=True).replace(str(root), "")
            results[protocol] = hashlib.sha256(text.encode()).hexdigest()
        drives = root / "drives"
        options = DriveOptions(sense="nothing", controller="simlingo")
        bend = [DriveSpec(1, "bend", "singapore-onenorth", 1)]
        drive_all(bend, drives, options, metadata={}, world_policy=constant_velocity_in_world)
        digest = hashlib.sha256()
        for written in sorted(path for path in drives.rglob("*") if path.is_file()):
            digest.update(written.relative_to(drives).as_posix().encode() + written.read_bytes())
        results["drive"] = digest.hexdigest()
    return results


def measured_under(setting: Setting) -> dict[str, str] | str:
    """The fingerprints under a setting, or what went wrong."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels", "--measure"],
        env=os.environ | setting,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip() or f"exit {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def decisions_under(setting: Setting) -> str:
    """What pytest says of the decisive tests under a setting; empty when they pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *DECISIONS],
        env=os.environ | setting,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-2000:]


def main() -> int:
    """Runs all settings and reports; 0 when every one gave the same."""
    tried, *others = settings()
    print(f"NumPy {np.__version__} on {MACHINE}: {len(others)} settings against the plain run", flush=True)
    faults = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        plain, *rest = pool.map(measured_under, [tried, *others])
        if isinstance(plain, str):
            print(plain)
            return 1
        for setting, result in zip(others, rest, strict=True):
            name = " ".join(f"{key}={value!r}" for key, value in setting.items())
            differ = (
                result if isinstance(result, str) else [key for key in plain if result[key] != plain[key]]
            )
            faults += bool(differ)
            print(f"{'DIFFERENT' if differ else 'same'}  {name}{f': {differ}' if differ else ''}", flush=True)
        oldest = others[-1]
        runs = [{"XLA_FLAGS": f"--xla_cpu_max_isa={isa}"} for isa in XLA_KERNELS]
        runs = [*runs[:-1], {**oldest, **(runs[-1] if runs else {})}]
        for setting, said in zip(runs, pool.map(decisions_under, runs), strict=True):
            name = " ".join(f"{key}={value!r}" for key, value in setting.items())
            faults += bool(said)
            print(f"{'FAILED' if said else 'passed'}  decisive tests, {name}\n{said}", flush=True)
    print("every setting gave the same bits and decisions" if not faults else f"{faults} settings differ")
    return int(faults > 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
        sys.exit(0)
    sys.exit(main())
