"""The pages of docs/reference/ name what is there, and all of it; building them needs the packages
of the extra `docs`, and is done where those are (mkdocs.yml).
"""

import importlib
import re
from pathlib import Path

import pytest
import vise_kernels
import yaml

from vise_fast.config.schema import Config

PAGES = Path(__file__).parents[1] / "docs" / "reference"


def blocks(page):
    """Each object that a page shows, and its options."""
    text = (PAGES / f"{page}.md").read_text()
    for path, options in re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, re.MULTILINE):
        yield path, (yaml.safe_load(options) or {}).get("options", {})


def found(path):
    """The object at a dotted path: a module, or what lies in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        place, _, name = path.rpartition(".")
        return getattr(found(place), name)


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_what_a_page_shows_is_there(page):
    shown = list(blocks(page))
    assert shown
    for path, options in shown:
        thing = found(path)
        assert thing.__doc__, path
        for name in options.get("members") or []:
            assert getattr(thing, name).__doc__, f"{path}.{name}"


def test_every_section_of_the_settings_is_shown():
    text = (PAGES / "settings.md").read_text()
    for name, field in Config.model_fields.items():
        assert (
            f"\n## {name}\n\n::: {field.annotation.__module__}.{field.annotation.__name__}\n"
            in text
        )


def test_every_op_is_shown():
    names = set()
    for path, options in blocks("kernels"):
        names |= set(options.get("members", [path.rpartition(".")[2]]))
    assert names == set(vise_kernels.__all__)
