"""The README and the pages of docs/: commands parse or run, and lists match the code."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import duckdb
import pyarrow as pa
import pytest
import torchvision
from ray.scripts import scripts as ray_scripts

import catsdogs
from catsdogs import cli, config, storage
from catsdogs.auditing.outputs import AUDITED_FILES, AUDITED_PAIRS
from catsdogs.auditing.suspects import SUSPECTS
from catsdogs.schema import RETRYABLE_STATUSES, STATUSES, build_schema
from catsdogs.start import start_ray
from catsdogs.train import TrainResult

REPO = Path(__file__).parents[1]
PACKAGE = Path(catsdogs.__file__).parent
MAX_README_LINES = 200
GENERATED = {"docs/benchmarks.md", "docs/benchmarks-gpu.md", "docs/faults.md"}
TEXTS = {
    path.relative_to(REPO).as_posix(): path.read_text() for path in (REPO / "README.md", *(REPO / "docs").glob("*.md"))
}
PAGES = {name: text for name, text in TEXTS.items() if name not in GENERATED}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [found for text in PAGES.values() for found in FENCE.findall(text)]
CONFIGS = {
    name: getattr(config, f"{name.title()}Config")
    for name in ("demo", "download", "train", "evaluate", "score", "verify", "audit", "review", "compare", "export")
}
# Arguments that are not `--` and the name of the setting.
ARGUMENTS = {("compare", "a"): "A", ("compare", "b"): "B", ("review", "class_name"): "--class"}
# Programs of the system, of an AWS account or of the network: their lines are parsed, not run.
EXTERNAL_PROGRAMS = {"aws", "cd", "chmod", "curl", "docker", "echo", "export", "git", "sed", "sha256sum", "source"} | {
    *("base64", "eksctl", "helm", "kubectl")
}
# Flags in the text that are not settings of a command: of catsdogs itself, of Ray, and the negative form of a flag.
OTHER_FLAGS = {"--help", "--version", "--verbose", "--working-dir", "--generate", "--head", "--temp-dir", "--no-resume"}
TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "list of float32": pa.list_(pa.float32()),
    "bool": pa.bool_(),
    "list of string": pa.list_(pa.string()),
}


def list_blocks(language: str) -> list[str]:
    return list(dict.fromkeys(text for found, text in BLOCKS if found == language))


def read_section(heading: str, page: str = "docs/reference.md") -> str:
    """Return the text under a heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading} in {page}"
    return found[1]


def read_rows(text: str) -> list[list[str]]:
    """Return the rows of every table in a text, without the headers."""
    lines = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in text.splitlines() if line.startswith("|")]
    headers = {i + step for i, cells in enumerate(lines) if set(cells[0]) == {"-"} for step in (-1, 0)}
    return [cells for i, cells in enumerate(lines) if i not in headers]


def read_names(text: str) -> list[str]:
    """Return the inline code in the first column of the tables in a text."""
    return [name for cells in read_rows(text) for name in re.findall("`(.*?)`", cells[0])]


def split_commands(script: str) -> Iterator[tuple[str, ...]]:
    """Split a shell script into simple commands, without the assignments before them."""
    for line in script.replace("\\\n", " ").splitlines():  # a comment ends with its line
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();&|"):
                if command and command[0] not in ("for", "done"):
                    yield tuple(command)
                command = []
            elif command or (word != "do" and not re.match(r"\w+=", word)):
                command.append(word)


COMMANDS = list(dict.fromkeys(words for script in list_blocks("sh") for words in split_commands(script)))


def find_arguments(words: tuple[str, ...]) -> list[str] | None:
    """Return the arguments of `catsdogs` or of a job's entry point; None for other programs."""
    words = words[words.index("--") + 1 :] if words[:3] == ("ray", "job", "submit") else words
    if words[0] == "catsdogs":
        return list(words[1:])
    if words[:2] == ("python", "-m"):
        assert words[2] in ("jobs.train", "jobs.score")
        return [words[2].removeprefix("jobs."), *words[3:]]
    return None


# Pages and links


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < MAX_README_LINES


def test_the_readme_links_every_page():
    assert TEXTS.keys() - {"README.md"} <= set(re.findall(r"\]\(([^)#]*)", PAGES["README.md"]))


def list_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\((.*?)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = ((REPO / page).parent / path).resolve() if path else REPO / page
        assert file.is_file(), target
        if anchor:
            assert anchor in list_anchors(TEXTS[file.relative_to(REPO).as_posix()]), target


# Code blocks


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_tested_language(page):
    found = FENCE.findall(PAGES[page])
    assert {language for language, _ in found} <= {"sh", "sql", "python", "text"}
    assert len(found) * 2 == len(re.findall(r"^```", PAGES[page], re.MULTILINE))


@pytest.mark.parametrize("script", list_blocks("sh"))
def test_shell_blocks_are_valid_shell(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [words for words in COMMANDS if find_arguments(words)], ids=" ".join)
def test_catsdogs_commands_parse(words, monkeypatch):
    if words[0] == "ray":  # a job refuses relative paths
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        monkeypatch.setenv("PWD", str(REPO))
    assert parse_config([os.path.expandvars(word) for word in find_arguments(words)])


def parse_config(arguments: Sequence[str]) -> Any:
    """Parse a command line of `catsdogs`; return the settings that its command would get."""
    parsed: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "COMMANDS", dict.fromkeys(CONFIGS.values(), lambda config, _: parsed.append(config) or 0))
        assert cli.main(list(arguments)) == 0
    (settings,) = parsed
    return settings


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "ray"], ids=" ".join)
def test_ray_commands_parse(words):
    command: click.Command = ray_scripts.cli
    rest = list(words[1 : words.index(">")] if ">" in words else words[1:])
    while isinstance(command, click.Group):
        command = command.commands[rest[0]]
        rest = rest[1:]
    command.make_context(command.name, rest)


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] not in ("catsdogs", "ray")], ids=" ".join)
def test_other_programs_and_files_exist(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == ".venv/bin/pytest":
        markers = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        assert set(words[2:]) <= {marker.partition(":")[0] for marker in markers}
    elif "/" in words[0]:
        assert os.access(REPO / words[0], os.X_OK)
    else:
        assert words[0] in EXTERNAL_PROGRAMS
    files = [word.removeprefix("file://") for word in words if word.startswith("file://")]
    files += [words[i + 1] for i, word in enumerate(words) if word == "-f"]
    assert all((REPO / name).is_file() for name in files)


def test_installed_extras_exist():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for text in PAGES.values() for name in re.findall(r"pip install -e '\.\[(\w+)\]'", text)}
    assert named == {"aws"} <= set(extras)


def test_the_weights_to_download_are_the_default_weights():
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url in PAGES["docs/training.md"]


# Lists


def test_the_readme_lists_every_command():
    assert read_names(read_section("Commands", "README.md")) == [f"catsdogs {name}" for name in CONFIGS]


def format_flag(command: str, name: str) -> str:
    return ARGUMENTS.get((command, name), f"--{name.replace('_', '-')}")


@pytest.mark.parametrize("command", CONFIGS)
def test_flag_tables_match_the_config(command):
    table = {cells[0].strip("`"): cells[1:] for cells in read_rows(read_section(f"catsdogs {command}"))}
    fields = {format_flag(command, field.name): field for field in dataclasses.fields(CONFIGS[command])}
    assert list(table) == list(fields)
    for flag, (default, meaning) in table.items():
        expected = fields[flag].default
        if expected is dataclasses.MISSING:
            assert default == "required", flag
        elif isinstance(expected, bool):
            assert default == ("on" if expected else "off"), flag
        elif expected is not None:
            assert default == f"`{'0.0001' if expected == 1e-4 else expected}`", flag
        for choice in typing.get_args(fields[flag].type):
            assert choice is type(None) or not isinstance(choice, str) or f"`{choice}`" in default + meaning, flag


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page):
    settings = {field.name for command in CONFIGS.values() for field in dataclasses.fields(command)}
    known = {f"--{name.replace('_', '-')}" for name in settings} | set(ARGUMENTS.values()) | OTHER_FLAGS
    text = FENCE.sub("", PAGES[page])
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page):
    named = set(re.findall(r"`catsdogs ([a-z]+)", FENCE.sub("", PAGES[page])))
    assert named <= set(CONFIGS)


def test_columns_and_statuses_match_the_schema():
    columns, statuses = read_rows(read_section("Columns")), read_rows(read_section("Status"))
    assert [(name.strip("`"), TYPES[kind]) for name, kind, _ in columns] == [
        (f.name, f.type) for f in build_schema(True, True)
    ]
    assert [name.strip("`") for name, _, _ in statuses] == list(STATUSES)
    assert [name.strip("`") for name, _, retryable in statuses if retryable == "yes"] == list(RETRYABLE_STATUSES)


@pytest.mark.parametrize(
    ("heading", "schema"), [("files", AUDITED_FILES), ("pairs", AUDITED_PAIRS), ("suspects", SUSPECTS)]
)
def test_columns_of_an_audit_match_the_schema(heading, schema):
    section = TEXTS["docs/audit.md"].partition(f"`{heading}.parquet` has these columns:\n\n")[2].partition("\n\n")[0]
    assert [(name.strip("`"), TYPES[kind]) for name, kind, _ in read_rows(section)] == [
        (f.name, f.type) for f in schema
    ]


def test_issues_of_an_audit_are_documented():
    assert set(config.ISSUES) <= set(re.findall(r"`([a-z_]+)`", TEXTS["docs/audit.md"]))


def test_image_extensions_match_the_listing():
    listed = next(line for line in read_section("Image files").splitlines() if line.startswith("`.jpg`"))
    assert re.findall(r"`(.*?)`", listed) == list(storage.EXTENSIONS)


def test_exit_codes_match_the_command_line():
    codes = [code for code, _ in read_rows(read_section("Exit codes"))]
    assert codes == re.findall(r"\b(\d+)\b", cli.__doc__.partition("Exit codes")[2])


def test_environment_variables_match_the_code():
    sources = [*PACKAGE.rglob("*.py"), REPO / "tests" / "conftest.py"]
    read = {name for path in sources for name in re.findall(r"CATSDOGS_[A-Z][A-Z0-9_]+", path.read_text())}
    documented = read_names(read_section("Environment variables"))
    assert {name for name in documented if name.startswith("CATSDOGS_")} == read


def test_messages_in_troubleshooting_are_in_the_code():
    messages = "\0".join(
        node.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    quoted = read_names(PAGES["docs/troubleshooting.md"])
    assert len(quoted) > 15
    assert [text for text in quoted if text not in messages] == []


def test_the_module_table_matches_the_package():
    listed = read_names(read_section("Modules", "docs/architecture.md"))
    modules = {path.name for path in PACKAGE.glob("*.py")} | {f"{path.parent.name}/" for path in PACKAGE.glob("*/*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == modules - {"__init__.py"}


def test_the_module_table_is_in_import_order():
    rows = read_rows(read_section("Modules", "docs/architecture.md"))
    uses_ray = {name.strip("`").rstrip("/").removesuffix(".py"): ray == "yes" for name, _, ray in rows}
    order = list(uses_ray)
    found = dict.fromkeys(order, False)
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        imported = list_imports(path)
        own = {name.split(".")[1] for name in imported if re.match(r"catsdogs\.[a-z]", name)}
        assert own <= {*order[: order.index(module) + 1]}, path
        found[module] |= any(name.split(".")[0] == "ray" for name in imported)
    assert found == uses_ray


def list_imports(path: Path) -> list[str]:
    """Return the full names that a file imports: `from catsdogs import data` gives catsdogs.data."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return modules + [
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    ]


@pytest.mark.parametrize("page", PAGES)
def test_source_files_in_the_text_exist(page):
    """A path is relative to the package, or to the repository."""
    files = set(re.findall(r"[\w/]+\.py\b", PAGES[page]))
    assert [name for name in files if not ((PACKAGE / name).is_file() or (REPO / name).is_file())] == []


DIAGRAM_LINES = [
    found.groups()
    for found in re.finditer(r"^ *(\w+)\(\) +([\w/]+\.py)\b", TEXTS["docs/architecture.md"], re.MULTILINE)
]


@pytest.mark.parametrize(("name", "file"), DIAGRAM_LINES)
def test_functions_in_the_call_diagrams_exist(name, file):
    tree = ast.parse((PACKAGE / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_call_diagrams_are_complete():
    """Each stage of the two diagrams is a line; a line that the pattern does not match is not checked."""
    lines = [line for text in list_blocks("text") if "cli.py" in text for line in text.splitlines()]
    assert len(lines) == len(DIAGRAM_LINES) > 30


# The README's block for one machine, run on tiny images, one of which is broken


@pytest.fixture(scope="module")
def work(red_blue_root, finished_run, tmp_path_factory):
    """Run `evaluate` and `score` of the block in an empty folder, with the run and the data of the session."""
    folder = tmp_path_factory.mktemp("readme")
    script = next(text for text in list_blocks("sh") if "catsdogs evaluate" in text)
    commands = [words[1:] for words in split_commands(script) if words[0] == "catsdogs"]
    assert [arguments[0] for arguments in commands] == ["download", "train", "evaluate", "score"]
    train_config = parse_config(commands[1])
    (folder / train_config.storage_path).mkdir()
    (folder / train_config.storage_path / train_config.name).symlink_to(finished_run.folder)
    data = folder / train_config.data_dir
    shutil.copytree(red_blue_root, data)
    (data / "validation" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    start_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in commands[2:]:
            assert cli.main(list(arguments)) == 0
    return folder


def list_folder(folder: Path) -> set[str]:
    return {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()}


def list_files(heading: str) -> set[str]:
    """Return the file names in the table of a section, not the keys of a JSON file."""
    return {name for name in read_names(read_section(heading)) if re.search(r"[./]|^_", name)}


def test_a_run_has_the_listed_files(work):
    optional = {"features/", "features.json", "left_out.parquet", "_lease.json"}
    assert list_files("Files of a run") == list_folder(work / "runs" / "first") | optional


def test_an_evaluation_has_the_listed_files_and_keys(work):
    assert list_folder(work / "runs" / "evaluation") == {"metrics.json", "predictions.parquet"}
    metrics = json.loads((work / "runs" / "evaluation" / "metrics.json").read_text())
    assert set(read_names(read_section("Files of an evaluation"))) == set(metrics)


def test_an_output_has_the_listed_files_and_keys(work):
    assert list_files("Files of an output") == list_folder(work / "runs" / "scores") | {"_lease.json"}
    summary = json.loads((work / "runs" / "scores" / "_summary.json").read_text())
    assert set(read_names(read_section("Files of an output"))) - list_files("Files of an output") == set(summary)


def test_sql_queries_run(work, monkeypatch):
    monkeypatch.chdir(work)
    with duckdb.connect() as connection:
        queries = [query for text in list_blocks("sql") for query in connection.extract_statements(text)]
        counts, failed = (connection.execute(query).fetchall() for query in queries)
    assert sum(count for _, count, _ in counts) == 15
    assert [(Path(path).name, status) for path, status, _ in failed] == [("broken.jpg", "truncated")]


def test_python_blocks_run(work, monkeypatch, capsys):
    _, train_block, pandas_block, _, timm_block = sorted(list_blocks("python"))
    monkeypatch.chdir(work)
    exec(timm_block, {})
    assert "['blue', 'red']" in capsys.readouterr().out
    exec(pandas_block, {})
    assert "true_label" in capsys.readouterr().out
    configs = []
    result = TrainResult(uri="runs/first", val_accuracy=1.0, best_epoch=1)
    metrics = json.loads((work / "runs" / "evaluation" / "metrics.json").read_text())
    # The fixture has trained and evaluated.
    monkeypatch.setattr(catsdogs, "train", lambda config: configs.append(config) or result)
    monkeypatch.setattr(catsdogs, "evaluate", lambda config: configs.append(config) or metrics)
    exec(train_block, {})
    assert configs[0].name == "first"
    assert configs[1].checkpoint == "runs/first/best"


def test_the_python_block_of_scoring_runs(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    (block,) = (text for text in list_blocks("python") if "VerifyConfig" in text)
    exec(block, {})
    assert capsys.readouterr().out == "{'ok': 14, 'truncated': 1} 15\n"
