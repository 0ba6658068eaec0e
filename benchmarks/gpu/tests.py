"""The tests whose result depends on the device: kernels, recorded numbers, the depth network.

float32 products are exact here (`jax_default_matmul_precision`): GPUs take 19-bit ones otherwise, and the
recorded numbers are held to float32 tolerances.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.rows import parser, tell

TESTS = (
    "tests/models/test_attention_gpu.py",
    "tests/models/test_golden.py",
    "tests/test_model.py",
    "tests/models/depth/test_unidepth.py",
    "tests/models/test_attention.py",
    "tests/models/test_decoder.py",
    "tests/inference/test_generate.py",
)
TINY = ("tests/models/test_attention_gpu.py",)


def main() -> None:
    """A row for each file, and one for each test that failed."""
    options = parser(__doc__).parse_args()
    files = TESTS if options.size == "published" else TINY
    # Set, so that tests/conftest.py does not ask for what suits a CPU.
    settings = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    failed = False
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.xml"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}", file],
                env={**os.environ, **settings},
                check=False,
                stdout=sys.stderr,
            )
            failed |= done.returncode != 0
            if not results.exists():
                tell(file=file, failed=f"pytest ended with {done.returncode} and no results")
                continue
            suite = ElementTree.parse(results).getroot().find("testsuite")
        assert suite is not None
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        tell(file=file, **counts, seconds=float(suite.get("time", 0)))
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                if (trouble := case.find(kind)) is not None:
                    said = (trouble.get("message") or "").splitlines()
                    tell(file=f"{case.get('name')}: {said[0][:120] if said else kind}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
