"""`python -m spacedrive_jax verify`."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from spacedrive_jax.console import Command, UserError
from spacedrive_jax.verify.check import Verifier

VERIFIERS: dict[str, str] = {
    "coordinate_encoding": "spacedrive_jax.verify.coordinate_encoding:verify_coordinate_encoding",
    "geometry": "spacedrive_jax.verify.geometry:verify_geometry",
    "ego_memory": "spacedrive_jax.verify.ego_memory:verify_ego_memory",
    "prompts": "spacedrive_jax.verify.prompts:verify_prompts",
    "generate": "spacedrive_jax.verify.generate:verify_generate",
    "train": "spacedrive_jax.verify.train:verify_train",
    "variants": "spacedrive_jax.verify.variants:verify_variants",
    "checkpoint": "spacedrive_jax.verify.checkpoint:verify_checkpoint",
    "unidepth": "spacedrive_jax.verify.depth:verify_unidepth",
    "metrics": "spacedrive_jax.verify.metrics:verify_metrics",
}
"""`kind` of a case's config.json to `module:function`, a `Verifier`; imported when needed."""


@dataclasses.dataclass(frozen=True)
class Verify(Command):
    """Compare this implementation with a recorded case, tensor by tensor.

    A case is a folder with config.json (its `kind` says what it holds), inputs, weights and outputs. Prints
    each tensor's largest absolute and relative error; fails when one is above its tolerance.

    Example: python -m spacedrive_jax verify tests/golden/spacedrive_train
    """

    case: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CASE")]
    """Folder of the case."""

    def run(self) -> Mapping[str, Any]:
        """Runs the case.

        Raises:
            UserError: the folder is not a case, or a tensor is out of tolerance.
        """
        checks = find_verifier(self.case)(self.case)
        width = max((len(check.name) for check in checks), default=0)
        print(f"{'tensor':{width}}  {'max abs':>9}  {'max rel':>9}  tolerance")
        for check in checks:
            mark = "" if check.passed else "  FAILED"
            print(
                f"{check.name:{width}}  {check.absolute:9.2e}  {check.relative:9.2e}  {check.tolerance}{mark}"
            )
        failed = [check for check in checks if not check.passed]
        worst = max(checks, key=lambda check: (not check.passed, check.relative), default=None)
        print(f"{len(checks) - len(failed)} of {len(checks)} tensors within tolerance")
        facts = {
            "passed": not failed,
            "tensors": len(checks),
            "worst": None
            if worst is None
            else {"name": worst.name, "abs": worst.absolute, "rel": worst.relative},
        }
        if not checks:
            raise UserError(f"{self.case} records nothing that could be compared")
        if failed:
            if self.json:
                print(json.dumps(facts))
            raise UserError(f"{self.case}: {len(failed)} tensors out of tolerance, first {failed[0].name}")
        return facts


def find_verifier(case: Path) -> Verifier:
    """The verifier of a case folder.

    Raises:
        UserError: no readable config.json, or a kind this version does not know.
    """
    try:
        settings = json.loads((case / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{case} is not a case: {error}") from error
    kind = settings.get("kind")
    if kind not in VERIFIERS:
        raise UserError(f"{case}: kind {kind!r} is not one of {', '.join(sorted(VERIFIERS))}")
    module, function = VERIFIERS[kind].split(":")
    return getattr(importlib.import_module(module), function)
