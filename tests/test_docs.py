"""The documents say what is there: links, commands, flags, the dependency table, named tests."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest
import test_imports

from cosmos3_fast.cli import COMMANDS, parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


def broken_links(name: str, text: str) -> list[str]:
    """Relative links of a document that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        inside = text if not path else target.read_text() if target.is_file() else ""
        if not target.exists() or (anchor and anchor not in anchors(inside)):
            found.append(link)
    return found


def flags_of(command: str) -> set[str]:
    actions = parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore
    return {
        flag
        for action in actions
        if not isinstance(action, argparse._HelpAction)
        for flag in action.option_strings
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name):
    assert broken_links(name, text_of(name)) == []


def test_a_link_that_leads_nowhere_is_found():
    text = "# A head\n[a](README.md) [b](#a-head) [c](#another) [d](absent.md) [e](LICENSE#x)"
    assert broken_links("README.md", text) == ["#another", "absent.md", "LICENSE#x"]


def test_the_readme_names_every_command():
    named = re.findall(r"^\| `cosmos3-fast ([a-z-]+)", text_of("README.md"), re.M)
    assert sorted(named) == sorted(COMMANDS)


def test_the_readme_names_every_flag_of_run_and_no_other():
    rows = re.findall(r"^\| (`--.*?) \|(.*)\|$", text_of("README.md"), re.M)
    named = set(re.findall(r"`(--[a-z-]+)", " ".join(cell for row in rows for cell in row)))
    assert named == flags_of("run")


def test_flags_in_command_lines_exist():
    lines = re.findall(r"```bash\n(.*?)```", text_of("README.md"), re.S)
    calls = re.findall(r"cosmos3[-_]fast (run|check|info) ((?:.*\\\n)*.*)", "\n".join(lines))
    assert len(calls) >= 6
    for command, rest in calls:
        flags = set(re.findall(r"(?<!\S)--[a-z-]+", rest.partition("#")[0]))
        assert flags <= flags_of(command), rest


def test_python_in_the_readme_names_what_is_there():
    import cosmos3_fast

    blocks = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    names = {
        alias.name
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "cosmos3_fast"
        for alias in node.names
    }
    assert len(names) > 10 and names <= set(cosmos3_fast.__all__)


def test_the_dependency_table_is_the_one_that_is_held():
    rows = re.findall(r"^\| (\d) \| (`.*`) \|$", text_of("CONTRIBUTING.md"), re.M)
    table = tuple(tuple(re.findall(r"`([^`]+)`", names)) for _, names in rows)
    assert [int(number) for number, _ in rows] == list(range(len(rows)))
    assert table == test_imports.ROWS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_tests_exist(name):
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    defined = {
        test for text in sources.values() for test in re.findall(r"^def (test_\w+)", text, re.M)
    }
    named = set(re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", text_of(name)))
    assert named - defined - set(sources) == set()
