"""Every text that we show has an English counterpart, with the same facts in it."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT

from gpu_resource_extensions.english import ENGLISH
from gpu_resource_manager_v01 import say

SOURCES = [PROJECT / "gpu_resource_manager_v01.py", PROJECT / "cli_v01.py"]
SOURCES += [path for path in (PROJECT / "gpu_resource_extensions").glob("*.py") if path.name != "english.py"]
JAPANESE = re.compile(r"[\u3001-\u30ff\u4e00-\u9fff\uff01-\uff5e]")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each Japanese literal of a source with its line; what is bilingual already needs no counterpart."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        found = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        for text in filter(JAPANESE.search, found):
            assert not isinstance(node, ast.JoinedStr), f"{path.name}:{node.lineno}: no template: {text}"
            if isinstance(node, ast.Constant) and "(Python 3.10 or later is needed)" not in text:
                yield node.lineno, text


def facts(template: str) -> list[str]:
    """Return the fields of a template, in any order."""
    fields = [(name, conversion) for _, name, _, conversion in string.Formatter().parse(template) if name is not None]
    numbered = [f"{name or number}{conversion}" for number, (name, conversion) in enumerate(fields)]
    return sorted({*numbered}) + re.findall(r"%[a-z]", template)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_text_has_a_counterpart(path: Path) -> None:
    assert [(line, text) for line, text in texts(path) if text not in ENGLISH] == []


def test_every_counterpart_is_of_a_text_that_there_is_and_holds_the_same_facts() -> None:
    used = {text for path in SOURCES for _, text in texts(path)}
    assert sorted(ENGLISH.keys() - used) == []
    for template, english in ENGLISH.items():
        assert facts(template) == facts(english), template
        assert not JAPANESE.search(english.replace("はい", "")), english
        assert template.count("\n") == english.count("\n"), template


def test_language_is_that_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert say("  実行中タスク: {}", 3) == "  実行中タスク: 3"
    monkeypatch.setenv("GPU_RESOURCE_LANG", "en")
    assert say("  実行中タスク: {}", 3) == "  Running tasks: 3"
