"""Two results are compared: the same images, and different ones."""

import io
import json
import math
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predictions_tables import CLASSES, build_table, draw_probs, list_parts, to_parquet, write_scoring
from scipy.stats import binomtest

from catsdogs import cli, storage
from catsdogs.comparison import compare
from catsdogs.comparison.drift import compute_psi, compute_psi_of_names, compute_psi_of_values
from catsdogs.comparison.pairs import compute_mcnemar_p
from catsdogs.config import FIGURES, CompareConfig
from catsdogs.errors import RunError
from catsdogs.progress import Message

OTHER_ORDER = ("fox", "cat", "dog")  # of B's classes
NUM_ROWS = 230


def list_paths(num_rows: int = NUM_ROWS, folder: str = "/data") -> list[str]:
    """List paths in class folders, and some in others; not in order."""
    names = (*CLASSES, "unknown")
    return [f"{folder}/{names[i * 7 % 4]}/{i * 37 % num_rows:05}.{'jpg' if i % 5 else 'PNG'}" for i in range(num_rows)]


def run(a: object, b: object, output: object, **settings: str) -> dict:
    return compare(CompareConfig(a=str(a), b=str(b), output=str(output), **settings))


@pytest.fixture
def drawn(tmp_path) -> tuple[str, str]:
    """Write two scorings of models with another order of classes; some images are only in one, some fail in one."""
    probs = draw_probs(NUM_ROWS, 0)
    mixed = 0.7 * probs + 0.3 * draw_probs(NUM_ROWS, 1)
    a = build_table(list_paths(), probs, failed=(3, 40, 41))
    order = np.random.default_rng(2).permutation(NUM_ROWS)[:-20]
    paths = [list_paths()[i] for i in order] + ["/data/cat/new.jpg"]
    b_probs = np.vstack([mixed[order], [[0.5, 0.3, 0.2]]]).astype(np.float32)
    reordered = b_probs[:, [CLASSES.index(name) for name in OTHER_ORDER]]
    failed = [int(np.flatnonzero(order == i)[0]) for i in (41, 90) if i in order]
    b = build_table(paths, reordered, OTHER_ORDER, failed)
    return write_scoring(tmp_path / "a", a), write_scoring(tmp_path / "b", b, OTHER_ORDER)


def query(a: str, b: str, sql: str) -> list[tuple]:
    """Query `pairs`, the images in both; `other` is B's probability of A's label."""
    position = "list_position(['fox', 'cat', 'dog'], a.label)"
    pairs = (
        f"SELECT a, b, CAST(b.probs[{position}] AS DOUBLE) AS other, "
        "a.true_label = b.true_label AS labelled, coalesce(a.label = a.true_label, false) AS correct_a, "
        "coalesce(b.label = b.true_label, false) AS correct_b "
        f"FROM '{a}/part-*.parquet' a JOIN '{b}/part-*.parquet' b USING (path)"
    )
    return duckdb.sql(f"WITH pairs AS ({pairs}) {sql}").fetchall()


def test_figures_of_pairs_equal_a_query(drawn, tmp_path):
    record = run(*drawn, tmp_path / "out")
    figures = record["figures"]
    ((num_both, changed, status_changed, flipped, mean, maximum),) = query(
        *drawn,
        "SELECT count(*), avg(CAST(a.status <> b.status OR a.label IS DISTINCT FROM b.label AS INT)), "
        "avg(CAST(a.status <> b.status AS INT)), avg(CAST(a.label <> b.label AS INT)), "
        "avg(abs(CAST(a.prob AS DOUBLE) - other)), max(abs(CAST(a.prob AS DOUBLE) - other)) FROM pairs",
    )
    assert (figures["in_both"], figures["only_in_a"], figures["only_in_b"]) == (num_both, 20, 1)
    found = [figures[name] for name in ("changed", "status_changed", "flipped", "mean_difference", "max_difference")]
    assert found == pytest.approx([changed, status_changed, flipped, mean, maximum], rel=1e-12)
    assert 0 < flipped < changed < 0.5
    matrix = query(*drawn, "SELECT a.label, b.label, count(*) FROM pairs WHERE a.label <> b.label GROUP BY ALL")
    assert set(matrix) == {
        (a, b, n) for a, row in record["pairs"]["flip_matrix"].items() for b, n in row.items() if a != b
    }
    statuses = query(*drawn, "SELECT a.status, b.status, count(*) FROM pairs GROUP BY ALL")
    assert set(statuses) == {(a, b, n) for a, row in record["pairs"]["status_matrix"].items() for b, n in row.items()}


def test_accuracy_recall_and_mcnemar_equal_a_query_and_scipy(drawn, tmp_path):
    record = run(*drawn, tmp_path / "out")
    figures, pairs = record["figures"], record["pairs"]
    ((num_labelled, accuracy_a, accuracy_b, only_a, only_b),) = query(
        *drawn,
        "SELECT count(*), avg(CAST(correct_a AS INT)), avg(CAST(correct_b AS INT)), "
        "count(*) FILTER (correct_a AND NOT correct_b), count(*) FILTER (correct_b AND NOT correct_a) "
        "FROM pairs WHERE labelled",
    )
    assert (pairs["labelled"], pairs["only_a_correct"], pairs["only_b_correct"]) == (num_labelled, only_a, only_b)
    assert [figures["accuracy_a"], figures["accuracy_b"]] == pytest.approx([accuracy_a, accuracy_b])
    assert figures["accuracy_drop"] == pytest.approx(accuracy_a - accuracy_b)
    assert figures["mcnemar_p"] == binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert only_a != only_b
    recall = query(
        *drawn,
        "SELECT a.true_label, avg(CAST(correct_a AS INT)), avg(CAST(correct_b AS INT)), count(*) "
        "FROM pairs WHERE labelled GROUP BY ALL",
    )
    assert {(name, row["a"], row["b"], row["images"]) for name, row in pairs["recall"].items()} == set(recall)
    assert figures["max_recall_drop"] == pytest.approx(max(a - b for _, a, b, _ in recall))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (1, 9), (40, 21)])
def test_mcnemar_is_two_tails_of_a_fair_coin(only_a, only_b):
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert compute_mcnemar_p(only_a, only_b) == pytest.approx(min(1, 2 * tail))


def test_changes_are_the_rows_that_changed(drawn, tmp_path):
    run(*drawn, tmp_path / "out")
    found = pq.read_table(tmp_path / "out" / "changes.parquet")
    expected = query(
        *drawn,
        "SELECT a.path, a.status, b.status, a.label, b.label, a.prob, b.prob, abs(CAST(a.prob AS DOUBLE) - other), "
        "CASE WHEN labelled THEN a.true_label END "
        "FROM pairs WHERE a.status <> b.status OR a.label IS DISTINCT FROM b.label",
    )
    assert sorted(tuple(row.values()) for row in found.to_pylist()) == sorted(expected)
    assert found.column_names == [
        *("path", "status_a", "status_b", "label_a", "label_b", "prob_a", "prob_b", "difference", "true_label")
    ]


def test_a_result_compared_with_itself_is_all_zero(drawn, tmp_path):
    record = run(drawn[0], drawn[0], tmp_path / "out", fail_if="changed>0,psi>0,mean_difference>0")
    figures = record["figures"]
    same = {"in_both", "accuracy_a", "accuracy_b", "mcnemar_p"}
    assert {name: figures[name] for name in set(FIGURES) - same - {"embedding_shift"}} == dict.fromkeys(
        set(FIGURES) - same - {"embedding_shift"}, 0
    )
    assert (figures["in_both"], figures["mcnemar_p"], figures["embedding_shift"]) == (NUM_ROWS, 1.0, None)
    assert pq.read_metadata(tmp_path / "out" / "changes.parquet").num_rows == 0
    assert [row["holds"] for row in record["conditions"]] == [False] * 3


def test_results_on_s3_give_the_same(drawn, tmp_path, bucket, put):
    for name, folder in zip("ab", drawn, strict=True):
        for file in Path(folder).iterdir():
            put(f"{name}/{file.name}", file.read_bytes())
    uris = [f"s3://{bucket}/{name}" for name in ("a", "b", "out")]
    record = run(*uris)
    local = run(*drawn, tmp_path / "out")
    assert record["figures"] == local["figures"]
    assert json.loads(storage.read_bytes(f"{uris[2]}/compare.json")) == record
    for name in ("changes.parquet", "report.html"):
        assert len(storage.read_bytes(f"{uris[2]}/{name}")) > 1000


def test_an_evaluation_a_run_and_a_file_are_results(tmp_path, red_blue_checkpoint):
    classes = ("blue", "red")
    table = build_table([f"/x/red/{i}.jpg" for i in range(9)], draw_probs(9, 0, 2), classes)
    for folder in ("evaluation", "run/best"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("evaluation/predictions.parquet", "one.parquet"):
        (tmp_path / name).write_bytes(to_parquet(table, classes))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)  # `train` writes no metadata
    (tmp_path / "run" / "val_predictions.parquet").write_bytes(buffer.getvalue())
    shutil.copy(red_blue_checkpoint / "config.json", tmp_path / "run" / "best")
    for b in ("one.parquet", "run/val_predictions.parquet"):
        figures = run(tmp_path / "evaluation", tmp_path / b, tmp_path / "out")["figures"]
        assert (figures["in_both"], figures["changed"], figures["psi"]) == (9, 0, 0)


# Different images


def test_images_under_other_paths_are_compared_as_sets(tmp_path):
    sharp = np.repeat([[0.98, 0.01, 0.01], [0.01, 0.01, 0.98]], 200, axis=0).astype(np.float32)
    sharp -= np.random.default_rng(0).uniform(0, 0.005, sharp.shape).astype(np.float32)
    half, other, vague = sharp[::2], sharp[1::2], (sharp[1::2] + 0.5) / 2.5
    events: list[object] = []
    figures = {}
    a = write_scoring(tmp_path / "a", build_table(list_paths(200), half))
    for name, probs in (("half", other), ("vague", vague)):
        b = write_scoring(tmp_path / name, build_table(list_paths(200, f"s3://b/{name}"), probs))
        config = CompareConfig(a=a, b=b, output=str(tmp_path / "out"))
        record = compare(config, events.append)
        figures[name] = record["figures"]
    assert record["pairs"] is None
    assert figures["half"]["changed"] is None
    assert (figures["half"]["in_both"], figures["half"]["only_in_a"], figures["half"]["only_in_b"]) == (0, 200, 200)
    assert figures["half"]["psi"] < 0.2 < 2 < figures["vague"]["psi"]
    assert figures["vague"]["psi_label"] == figures["vague"]["psi_width"] == figures["vague"]["psi_format"] == 0
    lines = [event.text for event in events if isinstance(event, Message)]
    assert lines == [record["note"]] * 2
    assert "no path is in both, but all file names of A are in B" in record["note"]


def test_hardly_any_path_in_common_gives_no_figures_of_pairs(tmp_path):
    paths = list_paths(300)
    a = write_scoring(tmp_path / "a", build_table(paths, draw_probs(300, 0)))
    others = [*paths[:2], *list_paths(298, "/other")]
    b = write_scoring(tmp_path / "b", build_table(others, draw_probs(300, 1)))
    record = run(a, b, tmp_path / "out")
    assert (record["figures"]["in_both"], record["figures"]["changed"], record["pairs"]) == (2, None, None)
    assert "only 2 paths are in both, too few for figures" in record["note"]
    assert set(pq.read_table(tmp_path / "out" / "changes.parquet")["path"].to_pylist()) <= set(paths[:2])


def test_the_shift_of_embeddings_is_that_of_their_means(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for name, mean in (("a", 0.0), ("b", 3.0)):
        embeddings = rng.normal(0, 1, (400, 4)).astype(np.float32) + np.array([mean, 0, 0, 0], np.float32)
        table = build_table(list_paths(400, f"/{name}"), draw_probs(400, 0), failed=(7,), embeddings_ND=embeddings)
        folders.append(write_scoring(tmp_path / name, table))
    shift = run(*folders, tmp_path / "out")["figures"]["embedding_shift"]
    assert shift == pytest.approx(3 / math.sqrt(4), rel=0.1)  # the standard deviation of four features


def test_embeddings_that_do_not_differ_have_no_shift(tmp_path):
    folders = []
    for name, shift in (("a", 0.0), ("b", 0.01)):
        row = np.abs(np.random.default_rng(0).normal(size=2048)).astype(np.float32) + np.float32(shift)
        table = build_table(list_paths(100, f"/{name}"), draw_probs(100, 0), embeddings_ND=np.repeat(row[None], 100, 0))
        folders.append(write_scoring(tmp_path / name, table))
    assert run(*folders, tmp_path / "out")["figures"]["embedding_shift"] is None


def test_formats_are_those_of_images(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.jpg?id=1", "d.jpg?id=2", "2024.05.06 beach", "e"]
    uri = write_scoring(tmp_path / "a", build_table([f"/x/{name}" for name in names], draw_probs(6, 0)))
    formats = run(uri, uri, tmp_path / "out")["a"]["formats"]
    assert formats == {".jpeg": 1, ".jpg": 1, "none": 1, "other": 3}


def test_psi_by_hand():
    assert compute_psi([50, 50], [50, 50]) == 0
    a, b = np.array([10.5, 30.5]) / 41, np.array([20.5, 20.5]) / 41
    assert compute_psi([10, 30], [20, 20]) == pytest.approx(sum((b - a) * np.log(b / a)))
    assert compute_psi([0, 10], [10, 0]) == pytest.approx(2 * (10 / 11) * math.log(21))
    assert compute_psi([0, 0], [1, 2]) is None
    assert compute_psi_of_names({"x": 3}, {"x": 7}) == 0
    values = np.random.default_rng(0).normal(size=5000)
    assert compute_psi_of_values(values, values * 1) == 0
    assert compute_psi_of_values(values[:2500], values[2500:]) < 0.02
    same = np.full(100, 500)
    assert compute_psi_of_values(same, same + 1) == compute_psi_of_values(same, same - 1) > 5


# Bad input


def damage(name: str, change):
    """Return a function that changes one file of a scoring."""

    def apply(folder: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return apply


def rewrite(change, **metadata: str):
    """Return a function that changes the table of the first part."""

    def apply(folder: Path) -> None:
        table = pq.read_table(folder / "part-00000.parquet")
        kept = {**table.schema.metadata, **{name.encode(): value for name, value in metadata.items()}}
        pq.write_table(change(table).replace_schema_metadata(kept), folder / "part-00000.parquet")

    return apply


def replace_value(name: str, value: object):
    def change(table: pa.Table) -> pa.Table:
        values = [value, *table[name].to_pylist()[1:]]
        field = pa.field(name, table.schema.field(name).type)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return rewrite(change)


def cast(name: str, kind: pa.DataType):
    return rewrite(lambda t: t.set_column(t.schema.get_field_index(name), name, t[name].cast(kind)))


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def keep_images(folder: Path) -> None:
    remove_all(folder)
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"")


def write_foreign(folder: Path) -> None:
    pq.write_table(pa.table({"path": ["x"], "label": ["cat"]}), folder / "part-00000.parquet")


def repeat(folder: Path) -> None:
    shutil.copy(folder / "part-00000.parquet", folder / "part-00099.parquet")
    (folder / "_summary.json").unlink()


def zero_middle(content: bytes) -> bytes:
    return content[:100] + bytes(len(content) - 1100) + content[-1000:]


BAD_INPUT = {
    "missing": (remove_all, "expected an output of score"),
    "images": (keep_images, "found '1.jpg'"),
    "unfinished": (damage("_SUCCESS", lambda _: None), "no _SUCCESS: run the same score command again"),
    "part missing": (damage("part-00001.parquet", lambda _: None), "expected 230 rows as its _summary.json says"),
    "part empty": (damage("part-00001.parquet", lambda _: b""), "part-00001.parquet: expected a Parquet file"),
    "part cut": (damage("part-00002.parquet", lambda c: c[:-9]), "part-00002.parquet: expected a Parquet file"),
    "part zeroed": (damage("part-00001.parquet", zero_middle), "part-00001.parquet"),
    "summary damaged": (damage("_summary.json", lambda _: b"[]"), "_summary.json: expected the summary"),
    "summary infinite": (damage("_summary.json", lambda _: b'{"rows": 1e400}'), "_summary.json: expected the summary"),
    "other tool": (write_foreign, "expected the column status of score"),
    "no metadata": (rewrite(lambda t: t, **{"catsdogs.class_names": "cat"}), "a list of different names"),
    "twice": (repeat, "expected each path once, found 50 rows"),
    "type": (cast("width", pa.int64()), "expected int32 in the column width, found int64"),
    "status": (replace_value("status", "fine"), "in the column status one of ok"),
    "label": (replace_value("label", "wolf"), "in the column label one of cat, dog, fox, found 'wolf'"),
    "label null": (replace_value("label", None), "a label where it is ok"),
    "probs short": (replace_value("probs", [1.0]), "expected 3 numbers in the column probs"),
    "prob too large": (
        replace_value("prob", 7.0),
        "expected probabilities of 0 to 1, found 7: written by another tool?",
    ),
    "prob nan": (replace_value("prob", math.nan), "found NaN or null"),
    "other classes": (
        rewrite(lambda t: t, **{"catsdogs.class_names": '["cat", "dog", "wolf"]'}),
        "the classes differ",
    ),
    "no rows": (
        lambda folder: [rewrite(lambda t: t.slice(0, 0))(folder), *map(Path.unlink, other_parts(folder))],
        "none",
    ),
}


def other_parts(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name not in ("part-00000.parquet", "_SUCCESS", "_run.json")]


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("side", ["a", "b"])
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, case, side):
    change, words = BAD_INPUT[case]
    for name in ("a", "b"):
        write_scoring(tmp_path / name, build_table(list_paths(), draw_probs(NUM_ROWS, 0)))
    change(tmp_path / side)
    code = cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1)
    assert words in captured.err
    assert str(tmp_path / side) in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("nosuch>1", "--fail-if: expected one of in_both"),
        ("changed", "--fail-if: expected conditions such as changed>0.02"),
        ("changed>", "got 'changed>'"),
        ("changed>0.1,", "got ''"),
        ("changed=0.1", "got 'changed=0.1'"),
        ("changed>1.2.3", "got 'changed>1.2.3'"),
        ("changed>nan", "got 'changed>nan'"),
        ("changed>1e999", "got 'changed>1e999'"),
        ("__import__('os').system('x')>1", "got \"__import__('os').system('x')>1\""),
        ("embedding_shift>0", "--fail-if embedding_shift>0: embedding_shift cannot be computed"),
        ("accuracy_drop>0", "accuracy_drop>0: accuracy_drop cannot be computed: no image is in both"),
    ],
)
def test_conditions_that_cannot_be_checked_are_refused(tmp_path, capsys, expression, words):
    folder = write_scoring(tmp_path / "a", build_table(["/x/1.jpg", "/x/2.jpg"], draw_probs(2, 0)))
    assert cli.main(["compare", folder, folder, "--output", str(tmp_path / "out"), "--fail-if", expression]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("changed>0.02", 3),
        ("changed > 0.99", 0),
        ("changed>=1e2,psi<=10", 3),
        ("in_both<210", 0),
        ("in_both<=210,psi_label>9", 3),
    ],
)
def test_exit_code_3_if_a_condition_holds(drawn, tmp_path, capsys, expression, code):
    assert cli.main(["compare", *drawn, "--output", str(tmp_path / "out"), "--fail-if", expression]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("catsdogs: --fail-if: " if code else "")
    assert bool(captured.err) == bool(code)
    assert json.loads(captured.out.splitlines()[-2])["in_both"] == 210
    assert (tmp_path / "out" / "compare.json").exists()


def test_nothing_to_compare_is_refused(tmp_path, capsys):
    a = write_scoring(tmp_path / "a", build_table(list_paths(20), draw_probs(20, 0)))
    b = write_scoring(tmp_path / "b", build_table(list_paths(20, "/other"), draw_probs(20, 0), failed=range(20)))
    assert cli.main(["compare", a, b, "--output", str(tmp_path / "out")]) == 2
    assert "nothing can be compared: 0 paths are in both" in capsys.readouterr().err


def test_the_output_is_another_folder(drawn, tmp_path, capsys):
    assert cli.main(["compare", *drawn, "--output", drawn[1]]) == 2
    assert "expected another folder than A and B" in capsys.readouterr().err


def test_an_interrupted_comparison_has_no_record(drawn, tmp_path):
    run(*drawn, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").mkdir()  # cannot be written
    with pytest.raises(RunError, match=r"report\.html"):
        run(*drawn, tmp_path / "out")
    assert not (tmp_path / "out" / "compare.json").exists()


def test_parts_of_many_rows_and_classes_are_read_in_batches(tmp_path):
    num_rows, num_classes = 9000, 2000  # more than a batch of rows; 72 MB of probabilities
    names = tuple(f"class {i}" for i in range(num_classes))
    probs = np.zeros((num_rows, num_classes), np.float32)
    probs[np.arange(num_rows), np.arange(num_rows) % num_classes] = 1
    table = build_table(list_paths(num_rows), probs, names)
    for name, moved in (("a", table), ("b", table.slice(1))):
        (tmp_path / name).mkdir()
        for file, content in list_parts(moved, names, num_rows).items():
            (tmp_path / name / file).write_bytes(content)
    figures = run(tmp_path / "a", tmp_path / "b", tmp_path / "out")["figures"]
    assert (figures["in_both"], figures["only_in_a"], figures["changed"]) == (num_rows - 1, 1, 0)
