"""The rules of the house that no linter knows, held over the syntax trees of the package."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import catsdogs

PACKAGE = Path(catsdogs.__file__).parent
# A module imports only from those before it; a folder counts as one module.
ORDER = [
    *("errors", "config", "progress", "schema", "storage", "labels", "vision", "images", "model", "fused"),
    *("saved", "checkpoint", "start", "data"),
    *("predict", "classify", "metrics", "report", "train", "score", "evaluate", "download", "demo", "cli"),
]
WITH_RAY = {"start", "data", "classify", "train", "score", "evaluate", "demo"}
LONGEST_FUNCTION = 40
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Name what a file imports, wherever in it, in full: `from catsdogs import data` gives catsdogs.data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Name the modules of the package that a file imports from."""
    names = [name.split(".")[1] for name in imported(TREES[path]) if name.split(".")[0] == "catsdogs"]
    return {name for name in names if not name.startswith("__")}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring."""
    first = node.body[0]
    docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_the_list_names_every_module():
    assert {module_of(path) for path in FILES} - {"__init__"} == set(ORDER)


@each_file
def test_a_module_imports_only_from_those_above_it(path):
    module = module_of(path)
    above = set() if module == "__init__" else {*ORDER[: ORDER.index(module)], module}
    assert own_imports(path) <= above


def test_train_and_score_do_not_know_each_other():
    for path in FILES:
        other = {"train": "score", "score": "train"}.get(module_of(path))
        assert other not in own_imports(path), path


def test_prediction_needs_no_reader():
    assert "data" not in own_imports(PACKAGE / "predict.py")


@each_file
def test_ray_is_imported_where_the_list_says(path):
    if module_of(path) not in WITH_RAY:
        assert "ray" not in {name.split(".")[0] for name in imported(TREES[path])}


def test_a_driver_that_only_hands_on_work_does_without_torch():
    code = "import sys, catsdogs.score, catsdogs.evaluate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@each_file
def test_only_the_command_line_prints(path):
    calls = {
        node.func.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    written = {ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
    streams = {f"sys.{stream}.{way}" for stream in ("stdout", "stderr") for way in ("write", "writelines")}
    if module_of(path) != "cli":
        assert "print" not in calls
        assert not written & streams


@each_file
def test_no_function_is_longer_than_a_screen(path):
    assert not {node.name: num_lines(node) for node in functions(TREES[path]) if num_lines(node) > LONGEST_FUNCTION}


def test_functions_are_short_on_the_whole():
    assert statistics.median(num_lines(node) for tree in TREES.values() for node in functions(tree)) <= 12


@each_file
def test_every_module_and_public_function_says_what_it_does(path):
    assert ast.get_docstring(TREES[path]), "a module without its one job"
    top = [node for node in TREES[path].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node.name for node in top if not node.name.startswith("_") and not ast.get_docstring(node)]


@each_file
def test_no_name_says_nothing(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    names = [node.name for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [
        name for name in names if name.lower().startswith(("process_", "do_")) or name.endswith(("Manager", "Handler"))
    ]


def test_our_errors_take_exactly_one_message():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("InputError", "RunError")
            ):
                assert (len(node.args), len(node.keywords)) == (1, 0), f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", ["train", "score"])
def test_a_jobs_entry_point_is_short(name):
    assert len((PACKAGE.parent / "jobs" / f"{name}.py").read_text().splitlines()) <= 20
