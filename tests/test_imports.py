"""The dependency rule: a module imports from lower rows only, and `ops` alone reaches kernels.

Imports are read from the sources, so one inside a function or behind TYPE_CHECKING counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# DESIGN's table, and in each row the parts that its modules are split into. A package stands for
# its modules, which may import each other.
ROWS: tuple[tuple[str, ...], ...] = (
    ("config", "request", "checks", "numeric", "cache", "stages", "modes", "transfer"),
    ("kernels", "_C"),
    (
        "ops",
        "parallel",
        "launch",
        "parallel_edges",
        "parallel_sum",
        "agreement",
        "watchdog",
        "checkpoint",
    ),
    ("layers",),
    ("model", "vae", "sampler", "tokenizer", "latents"),
    ("loader", "processor", "graph"),
    ("denoise", "startup", "kept"),
    ("engine", "testing"),
    ("cli", "__init__", "__main__"),
)
# Within a row, and in this direction only.
SAME_ROW = {
    ("request", "config"),
    ("request", "numeric"),
    ("config", "numeric"),
    ("checks", "request"),
    ("checks", "config"),
    ("checks", "numeric"),
    ("kept", "denoise"),
    ("ops", "parallel_edges"),
    ("ops", "parallel_sum"),
    ("startup", "denoise"),
    ("parallel_edges", "parallel"),
    ("parallel_sum", "parallel"),
    ("parallel", "launch"),
    ("watchdog", "launch"),
    ("watchdog", "parallel"),
    ("agreement", "launch"),
    ("agreement", "parallel"),
    ("testing", "engine"),
    ("__main__", "cli"),
}
# `ops` is the only door to raw kernels.
ONLY = {"kernels": {"ops"}, "_C": {"ops"}}
MAX_LINES = 400
ROW = {name: row for row, names in enumerate(ROWS) for name in names}


def module_name(path: Path, root: Path) -> str:
    """root/cosmos3_fast/vae/decoder.py -> "cosmos3_fast.vae.decoder"; packages end in __init__."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts if parts[0] == "cosmos3_fast" else ("cosmos3_fast", *parts))


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything of cosmos3_fast that the module's source imports;
    `from a import b` is a.b, and the constant beginning of an `import_module` argument counts.
    """
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = [
                part.value
                for argument in node.args[:1]
                for part in getattr(argument, "values", [argument])[:1]
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
        for name in names:
            if name.split(".")[0] in ("cosmos3_fast", "kernels"):
                yield node.lineno, name


def entry(dotted: str) -> str:
    """The table's entry of a dotted name: "cosmos3_fast.vae.decoder.X" -> "vae"."""
    parts = dotted.split(".")
    head = parts[1] if len(parts) > 1 else "__init__"
    return head if head in ROW else "__init__"


def violations(root: Path) -> list[str]:
    """Every import below `root` that breaks the rule, as text."""
    found = []
    for path in sorted([*root.glob("cosmos3_fast/**/*.py"), *root.glob("kernels/**/*.py")]):
        module = module_name(path, root)
        user = module.split(".")[1]
        if user not in ROW:
            found.append(f"{module} has no row in the table")
            continue
        for line, name in imported(path.read_text(), module):
            reason = broken(user, entry(name), name)
            if reason:
                found.append(f"{path.relative_to(root)}:{line} imports {name}: {reason}")
    return found


def broken(user: str, used: str, name: str) -> str:
    """Why `user` may not import `used`; empty if it may."""
    if name.split(".")[0] == "kernels":
        return "the package is cosmos3_fast.kernels"
    if user == used:
        return ""
    if user == "kernels":
        return "kernels import nothing else of the package"
    if user not in ONLY.get(used, {user}):
        return f"only {' and '.join(sorted(ONLY[used]))} may"
    if (user, used) in SAME_ROW or ROW[used] < ROW[user]:
        return ""
    return f"row {ROW[user]} uses row {ROW[used]}"


def long_files(root: Path) -> list[str]:
    """Files of the project over MAX_LINES lines, as text."""
    counts = {
        path: len(path.read_text().splitlines())
        for folder in ("cosmos3_fast", "kernels", "csrc", "tests", "bench")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu")
    }
    return [f"{path.relative_to(root)}: {n} lines" for path, n in counts.items() if n > MAX_LINES]


def test_imports_follow_the_table():
    assert violations(ROOT) == []


def test_no_file_is_too_long():
    assert long_files(ROOT) == []


def test_the_table_holds_no_stale_names():
    names = {path.name.split(".")[0] for path in (ROOT / "cosmos3_fast").iterdir()}
    assert sorted(set(ROW) - {"kernels", "_C"} - names) == []


PLANTED = {
    "upwards": ("cosmos3_fast/ops/a.py", "import cosmos3_fast.engine", "row 2 uses row 7"),
    "sideways": ("cosmos3_fast/model.py", "from cosmos3_fast import vae", "row 4 uses row 4"),
    "the-package-itself": ("cosmos3_fast/cli/a.py", "from cosmos3_fast import MODES", "row 8 uses"),
    "a-package-upwards": (
        "cosmos3_fast/vae/a.py",
        "from cosmos3_fast.graph import X",
        "row 4 uses",
    ),
    "relative": ("cosmos3_fast/layers/a.py", "from ..model import X", "row 3 uses row 4"),
    "in-a-function": (
        "cosmos3_fast/ops/a.py",
        "def f():\n    import cosmos3_fast.cli",
        "row 2 uses",
    ),
    "for-types": (
        "cosmos3_fast/request.py",
        "if TYPE_CHECKING:\n    from cosmos3_fast.engine import X",
        "row 0 uses row 7",
    ),
    "past-the-door": (
        "cosmos3_fast/layers/norm.py",
        "from cosmos3_fast.kernels import reference",
        "only ops may",
    ),
    "past-the-door-by-name": (
        "cosmos3_fast/engine.py",
        "importlib.import_module('cosmos3_fast._C')",
        "only ops may",
    ),
    "past-the-door-by-f-string": (
        "cosmos3_fast/engine.py",
        "importlib.import_module(f'cosmos3_fast.kernels.{name}')",
        "only ops may",
    ),
    "kernels-back": ("kernels/a.py", "from cosmos3_fast import config", "nothing else"),
    "the-wrong-kernels": ("cosmos3_fast/ops/a.py", "from kernels import reference", "package is"),
    "no-row": ("cosmos3_fast/helpers.py", "", "has no row"),
}
ALLOWED = {
    "downwards": ("cosmos3_fast/engine.py", "from cosmos3_fast import ops, denoise"),
    "one-package": ("cosmos3_fast/vae/a.py", "from cosmos3_fast.vae.b import X"),
    "relative": ("cosmos3_fast/vae/a.py", "from .b import X\nfrom . import c"),
    "kernels-among-themselves": ("kernels/a.py", "from cosmos3_fast.kernels import b"),
    "others": ("cosmos3_fast/config.py", "import torch, kernelsmith\nfrom json import loads"),
}


def plant(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source)


@pytest.mark.parametrize(("file", "source", "reason"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found(tmp_path, file, source, reason):
    plant(tmp_path, file, source)
    assert [reason in text for text in violations(tmp_path)] == [True]


@pytest.mark.parametrize(("file", "source"), ALLOWED.values(), ids=ALLOWED)
def test_an_allowed_import_is_not(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def test_a_long_file_is_found(tmp_path):
    plant(tmp_path, "csrc/a.cu", "//\n" * (MAX_LINES + 1))
    plant(tmp_path, "tests/a.py", "#\n" * MAX_LINES)
    assert long_files(tmp_path) == [f"csrc/a.cu: {MAX_LINES + 1} lines"]
