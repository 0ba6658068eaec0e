"""What a contributor and a citer read agrees with the project."""

import re

import yaml

import spacedrive_jax
from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()


def recipe(target):
    """Commands of a target of the Makefile, without the interpreter."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1].splitlines()
    return [line.strip().removeprefix("$(RUN) ") for line in lines]


def test_hooks_run_what_the_gate_runs_and_fetch_nothing():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    environment = hooks.pop("environment")["entry"].split()[-1]
    assert f"$(VENV)/{environment.split('/')[1]}:" in MAKEFILE
    assert "VENV ?= .venv\n" in MAKEFILE
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in hooks.values()}
    assert entries == {f".venv/bin/python {line.removesuffix(' .')}" for line in recipe("lint")}


def test_the_commands_that_the_page_lists_exist():
    listed = re.findall(r"^\| `make (\w+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert set(listed) == set(phony.split()) - {"help", "clean"}
    gate = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert set(gate) <= set(listed)


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == spacedrive_jax.__version__
    assert citation["title"] == "spacedrive_jax"
    assert citation["license"] == "Apache-2.0"
    assert "2512.10719" in citation["preferred-citation"]["url"]
