"""Rules for the package that no linter checks."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import catsdogs

PACKAGE = Path(catsdogs.__file__).parent
# A module imports only from those before it. A folder counts as one module.
ORDER = [
    *(
        "text",
        "errors",
        "ray_errors",
        "logs",
        "environment",
        "temporaries",
        "config",
        "progress",
        "schema",
        "table_files",
    ),
    *("storage", "path_lists", "lease", "labels", "images", "checkpoint", "process_setup"),
    *(
        "resnet",
        "safetensors_arrays",
        "torch_files",
        "weights",
        "inference_model",
        "local_ray",
        "ray_session",
        "start",
        "ray_metrics",
        "data",
    ),
    *("thresholds", "calibration", "decisions", "predictions", "results", "predict", "classify", "metrics", "report"),
    *(
        "train",
        "score",
        "evaluate",
        "auditing",
        "reviewing",
        "comparison",
        "exporting",
        "image_api",
        "download",
        "demo",
        "display",
        "commands",
        "cli",
    ),
]
WITH_RAY = {"local_ray", "start", "ray_metrics", "data", "classify", "train", "score", "evaluate", "demo"}
MAX_FUNCTION_LINES = 40
PRIVATE_NAMES = re.compile(r"_private|_internal|sys\.modules\[")
DOCUMENTED = {"os._exit"}  # public in spite of its name
# Operators that have no public name. Where they are missing, inference does without them.
FUSED_OPERATORS = {f"torch.ops.mkldnn._convolution_pointwise{suffix}" for suffix in ("", "_", "_.binary")}
# Attributes that Python, Pillow and torch document as settings.
PUBLIC_SETTINGS = {"sys.stdout", "sys.stderr", "Image.MAX_IMAGE_PIXELS", "AvifImagePlugin.DEFAULT_MAX_THREADS"} | {
    f"torch.backends.{name}.fp32_precision" for name in ("cuda.matmul", "cudnn.conv")
}
WITH_PRIVATE_NAMES = "local_ray"  # in the safe form that its docstring describes
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the full names that a file imports anywhere: `from catsdogs import data` gives catsdogs.data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports from."""
    names = [name.split(".")[1] for name in imported(TREES[path]) if name.split(".")[0] == "catsdogs"]
    return {name for name in names if not name.startswith("__")}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    first = node.body[0]
    docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_module(path: Path, node: ast.expr) -> str | None:
    """Return the imported module of another package that an attribute such as `a.b.c` starts with."""
    root = node
    while isinstance(root, ast.Attribute):
        root = root.value
    names = {
        (alias.asname or alias.name).split(".")[0]
        for statement in ast.walk(TREES[path])
        if isinstance(statement, ast.Import | ast.ImportFrom)
        if not (getattr(statement, "module", None) or statement.names[0].name).startswith("catsdogs")
        for alias in statement.names
    }
    return root.id if isinstance(root, ast.Name) and root.id in names else None


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_the_list_names_every_module():
    assert {module_of(path) for path in FILES} - {"__init__"} == set(ORDER)


@each_file
def test_a_module_imports_only_from_those_before_it(path):
    module = module_of(path)
    before = {*ORDER} if path == PACKAGE / "__init__.py" else {*ORDER[: ORDER.index(module)], module}
    assert own_imports(path) <= before


def test_train_and_score_do_not_import_each_other():
    for path in FILES:
        other = {"train": "score", "score": "train"}.get(module_of(path))
        assert other not in own_imports(path), path


def test_prediction_does_not_import_the_reader():
    assert "data" not in own_imports(PACKAGE / "predict.py")


@each_file
def test_ray_is_imported_where_the_list_says(path):
    if module_of(path) not in WITH_RAY:
        assert "ray" not in {name.split(".")[0] for name in imported(TREES[path])}


LARGE = {"torch", "torchvision", "ray.data", "ray.train", "matplotlib", "scipy"}


@pytest.mark.parametrize(
    ("modules", "needed"),
    [
        # Drivers until Ray starts; the last one is what a driver unpickles.
        (
            "catsdogs.train.driver, catsdogs.score.pipeline, catsdogs.evaluate.driver, catsdogs.start, "
            "catsdogs.auditing.pipeline, catsdogs.comparison.pipeline, catsdogs.reviewing.pipeline, "
            "catsdogs.exporting, catsdogs.images.decode",
            set(),
        ),
        # Drivers then; the last one is the controller of several workers.
        ("catsdogs.classify, catsdogs.train.trainer, catsdogs.train.process_group", {"ray.data", "ray.train"}),
    ],
)
def test_processes_import_only_the_large_packages_that_they_need(modules, needed):
    code = f"import sys, {modules}; print(*{LARGE} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) <= needed


def test_the_names_of_the_package_are_functions_whatever_is_imported():
    code = """
import sys
import catsdogs
assert not {"torch", "ray", "pyarrow", "numpy"} & set(sys.modules)
from catsdogs.train.report_page import write_report
from catsdogs.score.plan import Plan
from catsdogs.evaluate import evaluate, driver
assert catsdogs.evaluate is evaluate and driver.__name__ == "catsdogs.evaluate.driver"
print(*(name for name in catsdogs.__all__ if not callable(getattr(catsdogs, name))))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


@each_file
def test_only_one_module_uses_private_names_of_other_packages(path):
    if module_of(path) == WITH_PRIVATE_NAMES:
        return
    assert PRIVATE_NAMES.findall(path.read_text()) == []
    private = [
        ast.unparse(node)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and is_private(node.attr) and foreign_module(path, node)
    ]
    assert set(private) <= DOCUMENTED | FUSED_OPERATORS
    assert [name for name in imported(TREES[path]) if not name.startswith("catsdogs") and "._" in name] == []


@each_file
def test_no_module_replaces_names_of_other_packages(path):
    if module_of(path) == WITH_PRIVATE_NAMES:
        return
    nodes = list(ast.walk(TREES[path]))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    assert [ast.unparse(call) for call in calls if foreign_module(path, call.args[0])] == []
    replaced = [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and foreign_module(path, node)
    ]
    assert set(replaced) <= PUBLIC_SETTINGS


@each_file
def test_only_the_display_prints(path):
    calls = {
        node.func.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    written = {ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
    streams = {f"sys.{stream}.{way}" for stream in ("stdout", "stderr") for way in ("write", "writelines")}
    if module_of(path) != "display":
        assert "print" not in calls
        assert not written & streams


@each_file
def test_no_function_is_long(path):
    assert not {node.name: num_lines(node) for node in functions(TREES[path]) if num_lines(node) > MAX_FUNCTION_LINES}


def test_most_functions_are_short():
    assert statistics.median(num_lines(node) for tree in TREES.values() for node in functions(tree)) <= 12


@each_file
def test_modules_and_public_functions_have_docstrings(path):
    assert ast.get_docstring(TREES[path])
    top = [node for node in TREES[path].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node.name for node in top if not node.name.startswith("_") and not ast.get_docstring(node)]


@each_file
def test_no_name_is_vague(path):
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
