"""The README: what it tells to type parses or runs, what it lists is all there is."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import duckdb
import pyarrow as pa
import pytest
import torchvision
from ray.scripts import scripts as ray_scripts

import catsdogs
from catsdogs import cli, config
from catsdogs.schema import STATUSES, WITH_EMBEDDINGS
from catsdogs.start import start_ray

REPO = Path(__file__).parents[1]
TEXT = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
CONFIGS = {
    name: getattr(config, f"{name.title()}Config")
    for name in ("demo", "download", "train", "evaluate", "score", "verify")
}
# Programs of the system, of an account or of the network: their lines are read, never run.
ELSEWHERE = {"aws", "cd", "chmod", "curl", "export", "git", "sed", "source"}
TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "list of float32": pa.list_(pa.float32()),
}
TINY = {"--weights": "none", "--epochs": "1", "--img-size": "32", "--batch-size": "8"}


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def section(heading: str) -> str:
    """Take the text under a heading, up to the next one of any level; code has comments that look like headings."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Read every table of a text, without its heads."""
    lines = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in text.splitlines() if line.startswith("|")]
    heads = {i + step for i, cells in enumerate(lines) if set(cells[0]) == {"-"} for step in (-1, 0)}
    return [cells for i, cells in enumerate(lines) if i not in heads]


def commands(script: str) -> Iterator[list[str]]:
    """Cut a shell script into simple commands, the words of each; assignments before them are left out."""
    for line in script.replace("\\\n", " ").splitlines():  # a comment ends with its line
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();&|"):
                if command and command[0] not in ("for", "done"):
                    yield command
                command = []
            elif command or (word != "do" and not re.match(r"\w+=", word)):
                command.append(word)


LINES = [words for script in blocks("sh") for words in commands(script)]


def catsdogs_arguments(words: list[str]) -> list[str] | None:
    """Take what `catsdogs`, or a job's entry point, is given."""
    words = words[words.index("--") + 1 :] if words[:3] == ["ray", "job", "submit"] else words
    if words[0] == "catsdogs":
        return words[1:]
    if words[:2] == ["python", "-m"]:
        assert words[2] in ("jobs.train", "jobs.score")
        return [words[2].removeprefix("jobs."), *words[3:]]
    return None


# What it tells to type


def test_every_block_is_of_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"sh", "sql", "python", "text"}
    assert len(BLOCKS) * 2 == len(re.findall(r"^```", TEXT, re.MULTILINE))


@pytest.mark.parametrize("script", blocks("sh"))
def test_shell_blocks_are_shell(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [words for words in LINES if catsdogs_arguments(words)], ids=" ".join)
def test_commands_parse(words, monkeypatch, capsys):
    came = []
    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(CONFIGS.values(), lambda config, _: came.append(config) or 0))
    if words[0] == "ray":  # a job refuses relative paths
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        monkeypatch.setenv("PWD", str(REPO))
    assert cli.main([os.path.expandvars(word) for word in catsdogs_arguments(words)]) == 0, capsys.readouterr().err
    assert len(came) == 1


@pytest.mark.parametrize("words", [words for words in LINES if words[0] == "ray"], ids=" ".join)
def test_rays_commands_parse(words):
    command: click.Command = ray_scripts.cli
    rest = words[1 : words.index(">")] if ">" in words else words[1:]
    while isinstance(command, click.Group):
        command = command.commands[rest[0]]
        rest = rest[1:]
    command.make_context(command.name, rest)


@pytest.mark.parametrize("words", [words for words in LINES if words[0] not in ("catsdogs", "ray")], ids=" ".join)
def test_other_commands_exist(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif "/" in words[0]:
        assert os.access(REPO / words[0], os.X_OK)
    else:
        assert words[0] in ELSEWHERE
    files = [word.removeprefix("file://") for word in words if word.startswith("file://")]
    assert all((REPO / name).is_file() for name in files)


def test_extras_that_it_installs_exist():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", TEXT)) == {"aws"} <= set(extras)


def test_weights_to_fetch_are_those_of_the_default():
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url in TEXT


# What it lists


@pytest.mark.parametrize("command", CONFIGS)
def test_tables_list_every_flag_with_its_default(command):
    table = {cells[0].strip("`"): cells[1:] for cells in rows(section(f"catsdogs {command}"))}
    fields = {f"--{field.name.replace('_', '-')}": field for field in dataclasses.fields(CONFIGS[command])}
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


def test_columns_and_statuses_are_those_of_the_schema():
    table = rows(section("Columns"))
    columns, statuses = [cells for cells in table if len(cells) == 3], [cells for cells in table if len(cells) == 2]
    assert [(name.strip("`"), TYPES[kind]) for name, kind, _ in columns] == [(f.name, f.type) for f in WITH_EMBEDDINGS]
    assert [name.strip("`") for name, _ in statuses] == list(STATUSES)


def test_exit_codes_are_those_of_the_command_line():
    codes = [code for code, _ in rows(section("Exit codes"))]
    assert codes == re.findall(r"(\d+) ", cli.__doc__.partition("Exit codes: ")[2])


def test_messages_to_look_up_are_ours():
    said = "\0".join(
        node.value
        for path in Path(catsdogs.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    quoted = [text for symptom, _ in rows(section("When something fails")) for text in re.findall("`(.*?)`", symptom)]
    assert len(quoted) > 15
    assert [text for text in quoted if text not in said] == []


def test_the_tree_is_that_of_the_package():
    (tree,) = [text for text in blocks("text") if "catsdogs/\n" in text]
    listed = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    package = Path(catsdogs.__file__).parent
    modules = {path.name for path in package.glob("*.py")} | {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == modules - {"__init__.py"}


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((.*?)\)", TEXT):
        assert target[1:] in anchors if target.startswith("#") else (REPO / target).is_file(), target


# What it has done: the block of "Your own pictures", on tiny pictures of which one is broken


@pytest.fixture(scope="module")
def work(red_blue_root, ray_cluster, tmp_path_factory):
    """Type the block's commands in an empty folder; the download is there already."""
    folder = tmp_path_factory.mktemp("readme")
    script = next(text for text in blocks("sh") if "catsdogs evaluate" in text)
    typed = [words[1:] for words in commands(script) if words[0] == "catsdogs"]
    assert [arguments[0] for arguments in typed] == ["download", "train", "evaluate", "score"]
    data = folder / typed[1][typed[1].index("--data-dir") + 1]
    shutil.copytree(red_blue_root, data)
    (data / "validation" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    start_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in typed[1:]:
            tiny = [word for pair in TINY.items() for word in pair] if arguments[0] == "train" else []
            assert cli.main([*arguments, *tiny]) == 0
    return folder


def names(folder: Path) -> set[str]:
    return {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()}


def listed_names(heading: str) -> set[str]:
    return {re.findall("`(.*?)`", cells[0])[0] for cells in rows(section(heading))}


def test_a_run_holds_what_it_lists(work):
    only_sometimes = {"features/", "left_out.parquet"}
    assert listed_names("What a run leaves") == names(work / "runs" / "first") | only_sometimes
    assert names(work / "runs" / "evaluation") == {"metrics.json", "predictions.parquet"}
    metrics = json.loads((work / "runs" / "evaluation" / "metrics.json").read_text())
    assert [key for key in metrics if f"`{key}`" not in section("What a run leaves")] == []


def test_a_scoring_holds_what_it_lists(work):
    assert listed_names("What a scoring leaves") == names(work / "runs" / "scores") | {"_lease.json"}
    summary = json.loads((work / "runs" / "scores" / "_summary.json").read_text())
    assert [key for key in summary if f"`{key}`" not in section("What a scoring leaves")] == []


def test_sql_queries_run(work, monkeypatch):
    monkeypatch.chdir(work)
    with duckdb.connect() as connection:
        queries = [query for text in blocks("sql") for query in connection.extract_statements(text)]
        counts, failed = (connection.execute(query).fetchall() for query in queries)
    assert sum(count for _, count, _ in counts) == 15
    assert [(Path(path).name, status) for path, status, _ in failed] == [("broken.jpg", "truncated")]


def test_python_blocks_run(work):
    timm_block, pandas_block = blocks("python")
    assert "['blue', 'red']" in run_python(timm_block, work)
    assert "true_label" in run_python(pandas_block, work)


def run_python(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
