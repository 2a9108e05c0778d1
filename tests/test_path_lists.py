"""Path lists in all the forms in which other programs write them."""

import gzip
import os
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring import part_names, read_rows, run_scoring, write_images
from web_server import Response, serve

from catsdogs import storage, table_files
from catsdogs.errors import InputError, RunError
from catsdogs.path_lists import PathList, is_path_list

PATHS = ["/data/a.jpg", "/data/b c.jpg", "s3://bucket/é.jpg"]
SCHEMES = "file,s3"


def write(folder: Path, name: str, content: bytes | str | pa.Table) -> str:
    """Write one file, and the folders above it; return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def table(*paths: str | bytes | None, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"path": pa.array(paths, kind)})


def csv_text(delimiter: str = ",", end: str = "\n", header: str = "path", caption: str = "x") -> str:
    """Format PATHS as the second of three columns."""
    rows = [["id", header, "caption"], *([str(i), path, caption] for i, path in enumerate(PATHS))]
    return "".join(
        delimiter.join(f'"{cell}"' if '"' in cell or "\n" in cell else cell for cell in row) + end for row in rows
    )


# Text


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16, big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "compressed": lambda text: gzip.compress(text.encode()),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "txt"])
def test_text_files_are_read_in_every_encoding(kind, end, encode, tmp_path):
    text = csv_text("\t" if kind == "tsv" else ",", end) if kind != "txt" else end.join(PATHS)
    assert list(PathList(write(tmp_path, f"list.{kind}", encode(text)), SCHEMES)) == PATHS


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_header_shows_the_delimiter(quote, delimiter, tmp_path):
    names = delimiter.join(f"{quote}{name}{quote}" for name in ("id", "path", "caption"))
    rows = "".join(
        f'{i}{delimiter}"{path}"{delimiter}a, b; c\n'.replace("a, b; c", '"a, b; c"') for i, path in enumerate(PATHS)
    )
    assert list(PathList(write(tmp_path, "list.csv", f"\n{names}\n\n{rows}"), SCHEMES)) == PATHS


@pytest.mark.parametrize("caption", ["x" * 200_000, "two\nlines", "two\r\nlines", 'with ""quotes"", and commas', ""])
def test_other_columns_may_have_any_content(caption, tmp_path):
    text = csv_text(caption=caption).replace(f",{caption}\n", f',"{caption}"\n')
    assert list(PathList(write(tmp_path, "list.csv", text), SCHEMES)) == PATHS


def test_blank_lines_and_comments_are_no_paths(tmp_path):
    text = "# one path a line\n\n/a.jpg\n  \n/#1.jpg\n# the end"
    assert list(PathList(write(tmp_path, "list.txt", text))) == ["/a.jpg", "/#1.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("list.csv", "path\n" + "/caf\xe9.jpg\n" * 1000, "found the byte 0xe9 in line 2; convert it"),
        ("list.txt", "/a.jpg\n" * 2000 + "/caf\xe9.jpg\n", "found the byte 0xe9 in line 2001; convert it"),
        ("list.txt", "/a.jpg\n".encode("utf-16-le").decode("latin-1"), "found zero bytes; save it as UTF-8"),
        ("list.csv", "file,label\n/a.jpg,x\n", "column named path .*: there is none, only file, label"),
        ("list.csv", "path,path\n/a.jpg,x\n", "column named path .*: there are several"),
        ("list.csv", ",".join(["name" * 50] * 50) + "\n/a.jpg\n", "column named path .*there is none"),
        ("list.csv", "id,path\n1,/a.jpg\n2\n", "a path in every row of its column path, got None in line 3"),
        ("list.csv", "id,path\n1,\n", "a path in every row of its column path, got '' in line 2"),
        ("list.csv", 'path,caption\n/a.jpg,x\n/b.jpg,"stray\n/c.jpg,x\n', "after line 2: unexpected end of data"),
        ("list.txt.gz", "\x1f\x8b\x08 damaged", "cannot read this path list"),
        ("list.parquet", "no Parquet", "cannot read this path list"),
        ("list.parquet", "", "cannot read this path list"),
        ("list.parquet", "PAR1" + "\x15" * 40 + "\x08\0\0\0PAR1", "cannot read this path list"),
    ],
)
def test_what_is_no_path_list_is_refused_in_one_short_line(name, content, reason, tmp_path):
    uri = write(tmp_path, name, content.encode("latin-1"))
    with pytest.raises(InputError, match=reason) as caught:
        list(PathList(uri))
    assert str(caught.value).startswith(f"{uri}: ")
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"list.{kind}", content) for kind in ("csv", "txt") for content in ("", "\n", "\ufeff")),
        *(("list.csv", "id,path\n"), ("list.txt", "# nothing\n"), ("list.parquet", table(kind=pa.string()))),
        ("list.parquet/part-0.parquet", table(kind=pa.string())),
    ],
)
def test_an_empty_path_list_is_an_error(name, content, tmp_path):
    uri = write(tmp_path, name, content).removesuffix("/part-0.parquet")
    with pytest.raises(InputError, match="the path list is empty"):
        run_scoring(uri, tmp_path / "out")


# Schemes


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("# comment\n/a.jpg\n{}\n", "line 3"),
        ('id,path\n1,/a.jpg\n"2\n",{}\n', "line 4"),
        (["/a.jpg", "{}"], "row 2"),
    ],
    ids=["txt", "csv", "parquet"],
)
def test_a_path_has_the_scheme_of_its_list_unless_others_are_allowed(content, place, tmp_path):
    name = "list.parquet" if isinstance(content, list) else "list.csv" if content.startswith("id") else "list.txt"
    for path, flag in (("s3://bucket/b.jpg", "s3"), ("HTTPS://host/b.jpg", "https"), ("gopher://host/b.jpg", None)):
        filled = table(*(row.format(path) for row in content)) if isinstance(content, list) else content.format(path)
        uri = write(tmp_path, name, filled)
        hint = f"; if the list may name such files, add --allow-schemes {flag}" if flag else ""
        with pytest.raises(InputError) as caught:
            list(PathList(uri))
        assert str(caught.value) == f"{uri}: {place}: expected a local path, got {path}{hint}"
        if flag:
            assert list(PathList(uri, f"{flag.upper()}, gs")) == ["/a.jpg", path]


def test_a_list_in_a_store_names_no_file_of_this_machine(bucket, put):
    for path in ("/etc/shadow", "file:///etc/shadow", "x.jpg"):
        put("list.txt", f"s3://{bucket}/a.jpg\n{path}\n".encode())
        with pytest.raises(
            InputError, match=rf"list\.txt: line 2: expected s3://, got {path}; .* --allow-schemes file$"
        ):
            list(PathList(f"s3://{bucket}/list.txt"))
    assert len(list(PathList(f"s3://{bucket}/list.txt", "file"))) == 2


def test_a_path_with_a_secret_is_refused_with_its_line_and_not_shown(tmp_path):
    uri = write(tmp_path, "list.txt", "/a.jpg\nhttps://host/b.jpg?token=hunter2\nhttps://me:hunter2@host/c.jpg\n")
    for schemes in (None, "https"):
        with pytest.raises(InputError, match=r"list\.txt: line 2: ") as caught:
            list(PathList(uri, schemes))
        assert "hunter2" not in str(caught.value)


def test_an_unknown_scheme_cannot_be_allowed(tmp_path):
    with pytest.raises(InputError, match=r"^--allow-schemes: expected some of file, s3, http, .*, got 'ftp'$"):
        run_scoring(write(tmp_path, "list.txt", "/a.jpg\n"), tmp_path / "out", allow_schemes="s3,ftp")


def test_the_flag_reaches_the_list(tmp_path, bucket, put):
    put("a.jpg", b"a")
    uri = write(tmp_path, "list.txt", f"s3://{bucket}/a.jpg\n")
    with pytest.raises(InputError, match="--allow-schemes s3"):
        run_scoring(uri, tmp_path / "out")
    assert run_scoring(uri, tmp_path / "out", allow_schemes="s3")[0]["by_status"] == {"ok": 1}


# Limits


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_small_parquet_file_with_many_long_paths_is_refused(use_dictionary, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_UNPACKED_BYTES", 10 << 20)
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["/" + "x" * 100_000]))
    uri = f"{tmp_path}/list.parquet"
    pq.write_table(pa.table({"path": rows.cast(pa.string())}), uri, compression="zstd", use_dictionary=use_dictionary)
    assert Path(uri).stat().st_size < 50_000
    read = []
    with pytest.raises(InputError, match=r"expected at most 10 MiB and .* rows, unpacked; split it into several files"):
        read.extend(PathList(uri))
    assert len(read) <= 104


def test_a_repeated_path_of_a_parquet_file_takes_no_memory_before_its_turn(tmp_path):
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["/" + "x" * 100_000]))
    pq.write_table(pa.table({"path": rows}), tmp_path / "list.parquet")
    before = pa.default_memory_pool().max_memory()
    assert len(next(iter(PathList(f"{tmp_path}/list.parquet")))) == 100_001
    assert pa.default_memory_pool().max_memory() - before < 100 << 20


@pytest.mark.parametrize("name", ["list.txt.gz", "list.csv"])
def test_a_compressed_list_is_unpacked_up_to_a_limit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_UNPACKED_BYTES", 1 << 20)
    content = gzip.compress(b"path\n/a.jpg" + b"\n" * (10 << 20))
    with pytest.raises(InputError, match=r"expected at most 1 MiB and .* rows, unpacked"):
        list(PathList(write(tmp_path, name, content + gzip.compress(b"/b.jpg"))))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("list.csv", "path\n/a.jpg\n" + "," * 1000, 2),
        ("list.csv", "path\n/a.jpg\n" + '"\n",' * 250, 2),
        ("list.csv", "," * 1000, None),
        ("list.txt", "/a.jpg\n" + "/" * 1000, 1),
    ],
    ids=["commas", "line breaks in quotes", "header", "text"],
)
def test_a_line_has_a_limit(name, content, line, tmp_path, monkeypatch):
    """Each comma of a row takes eight bytes."""
    monkeypatch.setattr(table_files, "MAX_RECORD_CHARS", 1000)
    place = f" after line {line}" if line else ""
    with pytest.raises(InputError, match=f"cannot read this path list{place}: expected less than 1,000 characters"):
        list(PathList(write(tmp_path, name, content)))
    many_rows = "path,caption\n" + f"/a.jpg,{'x' * 900}\n" * 10
    assert len(list(PathList(write(tmp_path, "many_rows.csv", many_rows)))) == 10


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_the_encoding_is_found_in_pieces(encode, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "PIECE_BYTES", 3)
    assert list(PathList(write(tmp_path, "list.txt", encode("\n".join(PATHS))), SCHEMES)) == PATHS
    with pytest.raises(InputError, match="found the byte 0xe9 in line 3"):
        list(PathList(write(tmp_path, "latin-1.txt", "/a.jpg\n/ä.jpg\n".encode() + b"/caf\xe9.jpg\n")))


def test_a_list_has_a_limit_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_ROWS", 2)
    assert len(list(PathList(write(tmp_path, "a.parquet", table("/a", "/a"))))) == 2
    with pytest.raises(InputError, match="and 2 rows"):
        list(PathList(write(tmp_path, "b.parquet", table("/a", "/a", "/a"))))


# Parquet


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.binary())),
    ],
    ids=str,
)
def test_a_path_may_have_every_type_of_text(kind, tmp_path):
    values = [path.encode() for path in PATHS] if "binary" in str(kind) else PATHS
    try:
        uri = write(tmp_path, "list.parquet", table(*values, kind=kind))
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} does not write {kind} to Parquet")
    assert list(PathList(uri, SCHEMES)) == PATHS


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array(["/a.jpg", None]), "got None in row 2"),
        (pa.array([1, 2]), "got 1 in row 1"),
        (pa.array([{"path": "/a.jpg"}]), "expected text in the column path, got struct"),
        (pa.array([b"/a.jpg", b"/\xff.jpg"]), "after row 1: 'utf-8' codec can't decode"),
    ],
)
def test_a_row_without_a_path_is_refused(column, found, tmp_path):
    with pytest.raises(InputError, match=found):
        list(PathList(write(tmp_path, "list.parquet", pa.table({"path": column}))))


# Folders


FOLDERS = {
    "Spark": ["part-00000-1b2c.c000.snappy.parquet", "part-00001-1b2c.c000.snappy.parquet"],
    "Dask": ["part.0.parquet", "part.1.parquet"],
    "Ray Data": ["0_000000_000000.parquet", "0_000001_000000.parquet"],
    "partitioned": ["split=train/label=cat/part-0.parquet", "split=val/label=dog/part-0.parquet"],
    "in any case": ["A.PARQUET", "b.Parquet"],
}
IGNORED = [
    "_SUCCESS",
    "_metadata",
    "_common_metadata",
    ".part-0.parquet.crc",
    "_temporary/0/part-0.parquet",
    "README.md",
]


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_parquet_files_is_one_path_list(names, kind, tmp_path, bucket, put):
    root = {
        "local": f"{tmp_path}/in.parquet",
        "s3": f"s3://{bucket}/in.parquet",
        "memory": f"memory://{tmp_path}/in.parquet",
    }[kind]
    for name in IGNORED:
        storage.write_bytes(f"{root}/{name}", b"no list")
    for name, rows in zip(names, (PATHS[:1], PATHS[1:]), strict=True):
        local = write(tmp_path, f"files/{name}", table(*rows))
        storage.write_bytes(f"{root}/{name}", Path(local).read_bytes())
    assert is_path_list(root)
    assert list(PathList(root, SCHEMES)) == PATHS


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_a_folder_of_text_files_is_one_path_list(kind, tmp_path):
    header = "path\n" if kind == "csv" else ""
    for i, path in enumerate(PATHS):
        write(tmp_path, f"in.{kind}/part-{i}.{kind}", f"{header}{path}\n")
    write(tmp_path, f"in.{kind}/part-9.{kind}.gz", gzip.compress(f"{header}/z.jpg\n".encode()))
    write(tmp_path, f"in.{kind}/_SUCCESS", "")
    assert list(PathList(f"{tmp_path}/in.{kind}", SCHEMES)) == [*PATHS, "/z.jpg"]


def test_one_file_of_a_folder_is_in_memory_at_a_time(tmp_path):
    for i in range(8):
        write(tmp_path, f"in.txt/part-{i}.txt", "".join(f"/{i}/{j:06d}-{'x' * 200}.jpg\n" for j in range(20_000)))
    tracemalloc.start()
    paths = PathList(f"{tmp_path}/in.txt")
    assert all(previous < current for previous, current in pairwise(paths))
    assert sum(1 for _ in paths) == 160_000
    assert tracemalloc.get_traced_memory()[1] < 12 << 20  # a file has 4 MiB
    tracemalloc.stop()


def test_a_list_that_changes_between_its_iterations_is_an_error(tmp_path):
    for i in range(2):
        write(tmp_path, f"in.txt/part-{i}.txt", f"/{i}.jpg\n")
    paths = PathList(f"{tmp_path}/in.txt")
    assert list(paths) == list(paths) == ["/0.jpg", "/1.jpg"]
    write(tmp_path, "in.txt/part-0.txt", "/2.jpg\n")
    with pytest.raises(RunError, match=r"in\.txt/part-0\.txt changed while this path list was read"):
        list(paths)


@pytest.mark.parametrize("name", ["absent.parquet", "folder.parquet", "absent.txt"])
def test_a_path_list_that_is_not_there_is_an_error(name, tmp_path, bucket):
    (tmp_path / "folder.parquet").mkdir()
    for root in (str(tmp_path), f"s3://{bucket}", f"memory://{tmp_path}"):
        with pytest.raises(InputError, match=name):
            PathList(f"{root}/{name}")


def test_a_subfolder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "in.parquet/a/part-0.parquet", table(*PATHS))
    write(tmp_path, "in.parquet/b/part-0.parquet", table("/b.jpg"))
    real = os.scandir

    def scandir(folder):
        if os.fsencode(folder).endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot list .*in\.parquet/b in this path list: Permission denied"):
        PathList(f"{tmp_path}/in.parquet")


def test_the_paths_of_a_folder_are_scored_once_and_in_order(tmp_path):
    write_images(tmp_path / "images", a="a", b="b", c="c", d="d")
    a, b, c, d = (str(tmp_path / "images" / f"{name}.jpg") for name in "abcd")
    write(tmp_path, "in.parquet/part-0.parquet", table(d, b, a))
    write(tmp_path, "in.parquet/part-1.parquet", table(c, b))
    write(tmp_path, "in.parquet/_SUCCESS", "")
    run_scoring(tmp_path / "in.parquet", tmp_path / "out")
    assert [part_names(tmp_path / "out", shard) for shard in range(2)] == [["a.jpg", "b.jpg", "c.jpg"], ["d.jpg"]]
    write_images(tmp_path / "images", e="e")
    write(tmp_path, "in.parquet/part-2.parquet", table(str(tmp_path / "images" / "e.jpg")))
    assert run_scoring(tmp_path / "in.parquet", tmp_path / "out")[1] == ["e.jpg"]


def test_a_folder_of_parquet_files_without_images_says_how_to_name_it(tmp_path):
    write(tmp_path, "in/part-0.parquet", table(*PATHS))
    with pytest.raises(InputError, match=r"1 \.parquet; .* a folder of path lists needs a name that ends in \.parquet"):
        run_scoring(tmp_path / "in", tmp_path / "out")


def test_a_list_of_urls_from_a_web_server_is_scored(tmp_path):
    with serve() as server:
        statuses = {"a": [503, 200], "b": [200], "c": [404], "d": [401], "e": [429, 200]}
        urls = [
            server.add(f"{name}.jpg?w=1", *(Response(status, name.encode()) for status in responses))
            for name, responses in statuses.items()
        ]
        uri = server.add("list.txt", Response(503), Response(body="\n".join(urls).encode()))
        summary, _ = run_scoring(uri, tmp_path / "out")
        assert summary["by_status"] == {"access_denied": 1, "not_found": 1, "ok": 3}
        assert set(read_rows(str(tmp_path / "out"))) == set(urls)
        assert server.requests == {f"{name}.jpg?w=1": len(codes) for name, codes in statuses.items()} | {"list.txt": 2}
