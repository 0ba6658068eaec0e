"""The documents hold together: links lead somewhere, lines fit a screen, quirks named have a number."""

import re
import tomllib

import pytest

from tests.conftest import ROOT

DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
SOURCES = sorted(
    file
    for room in ("spacedrive_jax", "data_prep", "configs", "tests", "benchmarks")
    for file in (ROOT / room).rglob("*.py")
    if file.name != "test_docs.py"
)
LONGEST_LINE = 110


def headings(text):
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_what_is_there(document):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = document.parent / place if place else document
        if not file.exists() or (anchor and anchor not in headings(file.read_text())):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda file: file.stem)
def test_prose_fits_a_screen(document):
    """Rows of tables cannot be folded in Markdown, nor commands to be copied."""
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.S).splitlines()
    assert [line for line in prose if len(line) > LONGEST_LINE and not line.lstrip().startswith("|")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_code_that_is_named_is_there(document):
    """`room/file.py::name`, from the checkout, the package or where the document lies; not in a history."""
    if document.name == "CHANGELOG.md":
        return
    lost = []
    for path, name in re.findall(r"`([\w./]+\.py)(?:::(\w+))?`", document.read_text()):
        beside = (ROOT, ROOT / "spacedrive_jax", document.parent)
        file = next((folder / path for folder in beside if (folder / path).is_file()), None)
        known = file is not None or any(each.name == path for each in SOURCES)
        if not known or (file is not None and name and not re.search(rf"\b{name}\b", file.read_text())):
            lost.append(f"{path}::{name}")
    assert lost == []


def test_quirks_that_are_named_have_a_number():
    text = (ROOT / "docs" / "fidelity.md").read_text()
    numbered = re.findall(r"^\* \*\*(Q\d+)\*\*", text, re.M)
    assert numbered == [f"Q{number}" for number in range(1, len(numbered) + 1)]
    lost = []
    for file in SOURCES:
        for named in re.findall(r"\bQ\d+(?:-Q\d+)?\b", file.read_text()):
            lost += [f"{file.name}: {each}" for each in named.split("-") if each not in numbered]
    assert lost == []


def test_nothing_points_to_what_a_reader_does_not_have():
    """Notes from which the project was built are not part of it."""
    pointers = re.compile(r"reference_behaviour|\b(?:nuscenes_fields|open_loop|closed_loop_\w+)`? spec\b")
    found = [file.name for file in [*SOURCES, *DOCUMENTS] if pointers.search(file.read_text())]
    assert found == []


def test_documents_in_code_exist():
    found = [
        f"{file.name}: {name}"
        for file in SOURCES
        for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg|jpg)", file.read_text())
        if not (ROOT / name).exists()
    ]
    assert found == []


FENCE = re.compile(r"```(?:bash|sh)?\n(.*?)```", re.S)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_to_be_typed_can_be(document):
    """Variables have names that a shell takes; requirements files, extras, targets and modules are there."""
    text = document.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    wrong = []
    for block in FENCE.findall(text):
        names = re.findall(r"(?:^|export |env )([^\s=\"']+)=\S+ *(?:python|make|$|#)", block, re.M)
        wrong += [name for name in names if not re.fullmatch(r"[A-Za-z_]\w*", name)]
    wrong += [
        name
        for name in re.findall(r"\brequirements[\w-]*\.(?:txt|lock)", text)
        if not (ROOT / name).is_file()
    ]
    for extras in re.findall(r"pip install ['\"](?:\.|spacedrive_jax)\[([\w,]+)\]", text):
        wrong += [each for each in extras.split(",") if each not in project["optional-dependencies"]]
    wrong += [name for name in re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.M) if name not in targets]
    for module in re.findall(r"python3? -m ((?:benchmarks|tests|docs)(?:\.\w+)+)", text):
        path = ROOT.joinpath(*module.split("."))
        wrong += [] if path.with_suffix(".py").is_file() or path.is_dir() else [module]
    assert wrong == []
