"""What the pages beside the README say is so: files they name exist, versions agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import vise_fast

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|txt|toml|md))`")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", ".github/ISSUE_TEMPLATE/feature.yml")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    if page == "CONTRIBUTING.md":
        assert len(NAMED.findall(text)) > 30
    gone = {"utils.py"}
    for name in set(NAMED.findall(text)) - gone:
        assert (ROOT / name).exists() or (ROOT / "vise_fast" / name).exists(), name


@pytest.mark.parametrize(
    "file, kind, name",
    [
        ("method/experience.py", "def ", "play"),
        ("method/loss.py", "def ", "_kl_tokens"),
        ("method/loss.py", "def ", "advantages"),
        ("method/loss.py", "class ", "Beta"),
        ("method/loss.py", "class ", "ScoredTokens"),
        ("method/evidence.py", "class ", "Evidence"),
        ("images/views.py", "", "DRAWN"),
        ("images/sources.py", "class ", "Source"),
        ("images/sources.py", "def ", "open_source"),
        ("model/tree.py", "class ", "Backbone"),
        ("model/families.py", "", "FAMILIES"),
        ("model/families.py", "class ", "Family"),
        ("model/load.py", "def ", "backbone_of"),
        ("model/stock_modules.py", "", "INPUTS"),
        ("config/schema.py", "", "VIEW_KINDS"),
        ("text/prompts.py", "def ", "style_for"),
        ("config/schema.py", "class ", "DataConfig"),
    ],
)
def test_what_contributing_names_stands_where_it_says(file, kind, name):
    assert f"`{name}`" in (ROOT / "CONTRIBUTING.md").read_text()
    assert re.search(rf"^{kind}{name}\b", (ROOT / "vise_fast" / file).read_text(), re.MULTILINE)


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == vise_fast.__version__
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.group(1) == vise_fast.__version__


def test_every_linter_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text()
    for package in project["optional-dependencies"]["lint"]:
        assert re.search(rf"^{package}==", pinned, re.MULTILINE), package


def test_the_workflow_calls_what_anyone_can_call():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert {"run": ".ci/run"} in steps
    assert "make lint" in (ROOT / ".ci/run").read_text()
