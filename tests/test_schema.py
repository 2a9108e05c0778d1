"""The columns and statuses of the output."""

import random

import pyarrow as pa
import pyarrow.parquet as pq

from catsdogs.schema import FILES, LABELLED_FILES, OK, PREDICTIONS, STATUSES, parquet_bytes, read_table


def test_predictions_have_the_documented_columns_and_types():
    assert [(field.name, str(field.type)) for field in PREDICTIONS] == [
        ("path", "string"),
        ("status", "string"),
        ("label", "string"),
        ("index", "int32"),
        ("prob", "float"),
        ("probs", "list<item: float>"),
        ("error", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("size_bytes", "int64"),
        ("true_label", "string"),
    ]
    assert [field.name for field in PREDICTIONS if not field.nullable] == ["path", "status"]


def test_statuses_are_the_documented_ones():
    assert OK == "ok"
    assert set(STATUSES) == {
        *("ok", "empty", "unsupported", "truncated", "decode_error", "too_large", "changed"),
        *("not_found", "access_denied", "read_error", "decoder_crash"),
    }
    assert len(set(STATUSES)) == len(STATUSES)


def test_labelled_files_have_a_class_index():
    assert FILES.names == ["path", "size_bytes", "version"]
    assert LABELLED_FILES.names == [*FILES.names, "true_index"]
    assert not LABELLED_FILES.field("true_index").nullable


def test_predictions_survive_parquet(tmp_path):
    row = dict.fromkeys(PREDICTIONS.names) | {"path": "s3://b/a é.jpg", "status": "empty"}
    full = row | {
        "status": "ok",
        "label": "cats",
        "index": 0,
        "prob": 0.75,
        "probs": [0.75, 0.25],
        "size_bytes": 2**40,
    }
    table = pa.Table.from_pylist([row, full], schema=PREDICTIONS)
    pq.write_table(table, tmp_path / "x.parquet")
    found = pq.read_table(tmp_path / "x.parquet")
    assert found.to_pylist() == [row, full]
    assert [(field.name, field.type) for field in found.schema] == [
        (field.name, pa.list_(pa.field("element", pa.float32())) if field.name == "probs" else field.type)
        for field in PREDICTIONS
    ]


def test_damage_of_any_kind_is_an_arrow_exception():
    content = parquet_bytes(pa.table({"path": [f"p{i}" for i in range(200)], "probs": [[0.1, 0.9]] * 200}))
    rng = random.Random(0)
    errors = set()
    for _ in range(500):
        start = rng.randrange(len(content) - 64)
        try:
            read_table(content[:start] + rng.choice([b"", bytes(64), rng.randbytes(64)]) + content[start + 64 :])
        except pa.ArrowException as error:
            errors.add(type(error.__cause__))
    assert {type(None), OSError} <= errors  # pyarrow's own class, and one that was converted
