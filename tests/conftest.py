"""Fixtures shared by all tests."""

import ctypes
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import config, install_import_hook

# Every call into these rooms is held against its annotations, shapes included; `CHECK_TYPES=data,inference`
# takes others. Not all by default: the checker asks every sequence for an item at random, and in data,
# inference and reporting there are sequences that read files when asked, damaged ones in some tests; in
# driving a call of a step is checked so often that its tests take 40 % longer.
ROOMS = "batch,exact,models,interop,training,evaluation,world"
CHECKED = [f"spacedrive_jax.{room}" for room in os.environ.get("CHECK_TYPES", ROOMS).split(",") if room]
if CHECKED:
    import tests.runtime_types  # noqa: F401  (the hook looks its checker up as an attribute)

    install_import_hook(CHECKED, "tests.runtime_types.check")

# Compiled programs are shared by the tests of a session, those in processes of their own included.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="spacedrive-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# What is copied from buckets or worked out once; not the user's.
os.environ["SPACEDRIVE_CACHE"] = tempfile.mkdtemp(prefix="spacedrive-jax-cache-")
# Tests compile far more than they compute: these take half of a training step's compilation away.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")

# A shell that starts the tests in its background has them ignore Ctrl-C, and whatever they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def dropped_programs() -> Iterator[None]:
    """Gives memory back between modules: jax keeps every program it compiled, gigabytes over all tests."""
    yield
    if "jax" not in sys.modules:
        return
    sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed otherwise


@pytest.fixture
def hang_ups() -> Iterator[None]:
    """SIGHUP is heard, by what the test starts too, even where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types are not checked: the test hands over stand-ins, or records that cannot be read (the checker reads
    one of every sequence)."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def nuscenes_real() -> Path:
    folder = ROOT.parent / "shared" / "nuscenes_real"
    if not folder.is_dir():
        pytest.skip("the real nuScenes-mini pieces are not on this machine")
    return folder
