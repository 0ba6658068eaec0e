"""Compares recorded cases with this implementation: which function knows which kind, and what is printed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from tests.golden.verify.case_files import SETTINGS_FILE, left_out, read_settings, watching_outputs
from tests.golden.verify.check import Check

VERIFIERS: dict[str, str] = {
    "coordinate_encoding": "tests.golden.verify.coordinate_encoding:verify_coordinate_encoding",
    "geometry": "tests.golden.verify.geometry:verify_geometry",
    "ego_memory": "tests.golden.verify.ego_memory:verify_ego_memory",
    "prompts": "tests.golden.verify.prompts:verify_prompts",
    "generate": "tests.golden.verify.generate:verify_generate",
    "train": "tests.golden.verify.train:verify_train",
    "variants": "tests.golden.verify.variants:verify_variants",
    "checkpoint": "tests.golden.verify.checkpoint:verify_checkpoint",
    "unidepth": "tests.golden.verify.depth:verify_unidepth",
    "metrics": "tests.golden.verify.metrics:verify_metrics",
}
"""`kind` of a case's config.json to `module:function`, imported when needed: from a folder to its checks."""
WITH_SETTINGS = ("generate", "variants")
"""Kinds that record one model under many settings; their functions take the names of some (`only`)."""


def compare(folder: Path, only: Collection[str] = ()) -> tuple[dict[str, Any], str | None]:
    """Compares a case, or every case of a folder, and prints what was found.

    Args:
        folder: of a case, or of folders of cases.
        only: settings to compare, by name, of a case that records many.

    Returns:
        The `--json` fields, and what is wrong in words; None where nothing is.

    Raises:
        SpaceDriveError: there is no case, or it cannot be compared.
    """
    if (folder / SETTINGS_FILE).is_file():
        checks, not_compared = compare_case(folder, only)
        print_table(checks)
        print_not_compared(not_compared)
        return summary(checks) | {"not_compared": not_compared}, _problem(checks)
    if only:
        raise ConfigError(f"--only chooses among the settings of one case; {folder} is none")
    return verify_all(*find_cases(folder))


class Compared(NamedTuple):
    """A case that was compared."""

    checks: list[Check]
    not_compared: list[str]
    """Recorded arrays and files that have no counterpart here, or that no setting names."""


def verify_case(case: Path, only: Collection[str] = ()) -> list[Check]:
    """The checks of `compare_case`."""
    return compare_case(case, only).checks


def compare_case(case: Path, only: Collection[str] = ()) -> Compared:
    """Compares one case, or some of its settings.

    Raises:
        SpaceDriveError: no readable config.json, a kind this version does not know, one without named
            settings where some are asked for, files that are missing, damaged or at odds, or nothing to
            compare.
    """
    kind = kind_of(case)
    module, function = VERIFIERS[kind].split(":")
    verifier = getattr(importlib.import_module(module), function)
    if only and kind not in WITH_SETTINGS:
        raise ConfigError(f"{case}: a case of kind {kind} has no settings for --only to choose from")
    try:
        with watching_outputs() as opened:
            checks = verifier(case, only) if only else verifier(case)
    except SpaceDriveError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{case}: {type(error).__name__}: {error}. Its arrays and settings do not fit each other, or "
            "this version does not know their layout (--debug shows where)"
        ) from error
    if not checks:
        raise DataError(f"{case} records nothing that could be compared")
    return Compared(checks, left_out(opened, of=None if only else case))


def kind_of(case: Path) -> str:
    """What a case's config.json says it holds.

    Raises:
        DataError: it cannot be read, or names no kind that this version knows.
    """
    kind = read_settings(case).get("kind")
    if kind not in VERIFIERS:
        raise DataError(f"{case}: kind {kind!r} is not one of {', '.join(sorted(VERIFIERS))}")
    return kind


def find_cases(folder: Path) -> tuple[list[Path], list[Path]]:
    """The cases directly inside a folder.

    Returns:
        The cases, and folders that are none: their config.json is whole and names no kind (a checkpoint's).

    Raises:
        DataError: there is no case.
    """
    folders = sorted(file.parent for file in folder.glob(f"*/{SETTINGS_FILE}"))
    others = [each for each in folders if _is_something_else(each)]
    cases = [each for each in folders if each not in others]
    if not cases:
        raise DataError(f"{folder} is not a case and holds none: no {SETTINGS_FILE} with a kind")
    return cases, others


def _is_something_else(folder: Path) -> bool:
    try:
        return "kind" not in read_settings(folder)
    except SpaceDriveError:
        return False  # a damaged case: comparing it says what is wrong


def verify_all(cases: Sequence[Path], others: Sequence[Path]) -> tuple[dict[str, Any], str | None]:
    """Compares several cases, printing a line for each and its failing tensors.

    Args:
        cases: folders to compare.
        others: folders to name as left out.

    Returns:
        The facts for `--json`, and what is wrong in words; None where nothing is.
    """
    width = max(len(case.name) for case in cases)
    entries, everything = [], []
    for case in cases:
        entry: dict[str, Any] = {"case": case.name}
        try:
            checks, not_compared = compare_case(case)
        except SpaceDriveError as error:
            print(f"{case.name:{width}}  FAILED  {error}", flush=True)
            entries.append(entry | {"passed": False, "tensors": 0, "worst": None, "error": str(error)})
            continue
        failed = [check for check in checks if not check.passed]
        mark = "FAILED" if failed else "passed"
        within = f"{len(checks) - len(failed)} of {len(checks)} tensors within tolerance"
        print(f"{case.name:{width}}  {mark}  {within}", flush=True)
        if failed:
            print_table(failed)
        print_not_compared(not_compared)
        entries.append(entry | summary(checks) | {"not_compared": not_compared})
        everything += [dataclasses.replace(check, name=f"{case.name}/{check.name}") for check in checks]
    for folder in others:
        print(f"{folder.name:{width}}  left out: its {SETTINGS_FILE} names no kind", flush=True)
    bad = [entry["case"] for entry in entries if not entry["passed"]]
    print(f"{len(cases) - len(bad)} of {len(cases)} cases passed")
    left_out = [folder.name for folder in others]
    outcome = summary(everything) | {"passed": not bad, "cases": entries, "left_out": left_out}
    return outcome, f"{len(bad)} cases failed: {', '.join(bad)}" if bad else None


def print_table(checks: Sequence[Check]) -> None:
    """Prints each tensor's errors, and how many are within tolerance."""
    width = max((len(check.name) for check in checks), default=0)
    print(f"{'tensor':{width}}  {'max abs':>9}  {'max rel':>9}  tolerance")
    for check in checks:
        mark = "" if check.passed else "  FAILED"
        print(f"{check.name:{width}}  {check.absolute:9.2e}  {check.relative:9.2e}  {check.tolerance}{mark}")
    passed = sum(check.passed for check in checks)
    print(f"{passed} of {len(checks)} tensors within tolerance")


def print_not_compared(names: Sequence[str]) -> None:
    """Prints which recorded arrays nothing was compared with, if any."""
    if names:
        more = f" and {len(names) - 8} more (--json names all)" if len(names) > 8 else ""
        print(f"not compared: {', '.join(names[:8])}{more}")


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    """The `--json` fields of a case; an error that is not finite (another shape, nan) is null."""
    worst = max(checks, key=lambda check: (not check.passed, check.relative), default=None)
    return {
        "passed": all(check.passed for check in checks),
        "tensors": len(checks),
        "worst": worst
        and {"name": worst.name, "abs": _finite(worst.absolute), "rel": _finite(worst.relative)},
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _problem(checks: Sequence[Check]) -> str | None:
    failed = [check.name for check in checks if not check.passed]
    return f"{len(failed)} tensors out of tolerance, first {failed[0]}" if failed else None
