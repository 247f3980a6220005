"""The documents say what is there: links, commands, flags, the dependency table, named tests."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_imports

from cosmos3_fast.cli import COMMANDS, parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/model.md", "bench/README.md",
)  # fmt: skip


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


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of each line of code, continued lines joined, without comments."""
    for block, span in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.S):
        for line in (block or span).replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].split()


def script_calls(text: str) -> Iterator[tuple[str, set[str]]]:
    """(file, flags) of each `python FILE ...`, `torchrun ... FILE ...`; "..." repeats the last."""
    script = ""
    for words in command_lines(text):
        names = [word.rpartition("/")[2] for word in words]
        if {"python", "torchrun"} & set(names):
            script = next((word for word in words if word.endswith(".py")), "")
            words = words[words.index(script) + 1 :] if script else []
        elif words[:1] != ["..."]:
            continue
        if script:
            yield script, {word.partition("=")[0] for word in words if word.startswith("--")}


def flags_in(path: Path) -> set[str]:
    """Flags that a script's parser is given, or that of a file beside it which it imports."""
    found, beside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith("add"):
            texts = [x.value for x in node.args if isinstance(x, ast.Constant)]
            found |= {x for x in texts if isinstance(x, str) and x.startswith("--")}
        elif isinstance(node, ast.Import):
            beside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            beside.add(node.module)
    files = (path.with_name(f"{name}.py") for name in beside)
    return found.union(*(flags_in(file) for file in files if file.is_file()))


def wrong_calls(text: str) -> list[str]:
    """Scripts that are not there, and flags that theirs do not take."""
    found = []
    for script, flags in script_calls(text):
        path = ROOT / script
        unknown = flags - flags_in(path) if path.is_file() else {"no such file"}
        found += [f"{script}: {flag}" for flag in sorted(unknown)]
    return found


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
    calls = 0
    for words in (words for name in DOCUMENTS for words in command_lines(text_of(name))):
        starts = [i for i, word in enumerate(words) if word in ("cosmos3-fast", "cosmos3_fast")]
        for command, *rest in (words[i + 1 :] for i in starts if words[i + 1 : i + 2]):
            if command in COMMANDS:
                calls += 1
                flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
                assert flags <= flags_of(command), words
    assert calls >= 12


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scripts_in_command_lines_exist_and_take_their_flags(name):
    calls = list(script_calls(text_of(name)))
    assert wrong_calls(text_of(name)) == []
    assert name.startswith("docs/") or len(calls) >= 3


def test_a_command_line_that_does_not_run_is_found():
    text = """`torchrun --nproc_per_node=2 bench/ranks.py --tp 2 --tb 2`, `... --pooled=8 --poled`
```bash
X=1 python bench/absent.py --tp 2
.venv/bin/python tests/gpu_halo_ranks.py \\
    --replays 5 --reply 5   # --not-a-flag
torchrun --nproc_per_node=2 -m cosmos3_fast run --tp 2
```"""
    assert wrong_calls(text) == [
        "bench/ranks.py: --tb",
        "bench/ranks.py: --poled",
        "bench/absent.py: no such file",
        "tests/gpu_halo_ranks.py: --reply",
    ]


def test_the_kernels_script_tells_its_flags_without_a_gpu(tmp_path):
    script = ROOT / "tests" / "gpu_kernels.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert flags_in(script) <= set(re.findall(r"--[a-z-]+", done.stdout))


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
    files = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("bench/test_*.py")]
    defined = {
        test for path in files for test in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", text_of(name)))
    assert named - defined - {path.name for path in files} == set()
