"""`python -m spacedrive_jax verify`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from spacedrive_jax.cli.common import use_compilation_cache
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.json_files import to_json

CHECKOUT = Path(__file__).resolve().parents[2]
RUNNER = "tests.golden.verify.runner"


@dataclasses.dataclass(frozen=True)
class Verify(Command):
    """Compare this implementation with recorded cases, tensor by tensor.

    A case is a folder with config.json (its `kind` says what it holds), inputs, weights and outputs. Prints
    each tensor's largest absolute and relative error; fails when one is above its tolerance. Of a folder of
    cases, all are compared, and of each only the tensors that fail are named.

    Example: python -m spacedrive_jax verify tests/golden/spacedrive_train
    """

    case: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CASE")]
    """Folder of a case, or a folder of such folders."""
    only: tuple[str, ...] = ()
    """Settings to compare, by name, of a case that records many (kinds `generate` and `variants`)."""

    def run(self) -> Mapping[str, Any]:
        """Runs the case or cases.

        Raises:
            SpaceDriveError: a folder is not a case, or a tensor is out of tolerance.
        """
        use_compilation_cache()
        outcome, problem = load_runner().compare(self.case, self.only)
        if problem is not None:
            if self.json:
                print(to_json(outcome))
            raise SpaceDriveError(f"{self.case}: {problem}")
        return outcome


def load_runner() -> ModuleType:
    """What compares cases. It lies beside them, with the tests: an installed package has neither.

    Raises:
        ConfigError: this is no checkout.
    """
    if not CHECKOUT.joinpath(*RUNNER.split(".")).with_suffix(".py").is_file():
        raise ConfigError(
            f"verify needs a checkout of the project (there is no tests/golden in {CHECKOUT}): clone it, and "
            "run the command there"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(RUNNER)
