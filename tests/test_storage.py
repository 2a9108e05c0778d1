"""Storage over real folders, a real S3 endpoint, and small servers that respond as a failing S3 does."""

import errno
import hashlib
import http.server
import os
import stat
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import NoCredentialsError, UnauthorizedSSOTokenError
from forked import run_forked
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from catsdogs import storage
from catsdogs.errors import InputError, RunError
from catsdogs.progress import StageProgress
from catsdogs.schema import FILES
from catsdogs.storage import Entry, Listing
from catsdogs.storage.entries import is_listed
from catsdogs.storage.s3 import check_credentials, split_s3

NOBODY = 65534
ODD_NAMES = [
    "with space.jpg",
    "100%.jpg",
    "%20.jpg",
    "a+b.jpg",
    "what?.jpg",
    "v?versionId=1.jpg",
    "#1.jpg",
    "żółć 猫 🐈.jpg",
    "line\nbreak.jpg",
    "tab\tand 'quotes\".jpg",
    "back\\slash.jpg",
    "*[a].jpg",
    "a:b@c.jpg",
    "-dash.jpg",
    "~.jpg",
]


def paths(root: object) -> list[str]:
    return [entry.path for entry in Listing(str(root))]


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def as_nobody(work: Callable[[], object]) -> str:
    """Run `work` in a forked process without root's rights; return its result as text."""
    if os.geteuid() != 0:
        pytest.skip("only root can drop its rights")
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of other threads; the child uses none
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_end, str(work()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        result = file.read().decode()
    os.waitpid(child, 0)
    return result


@pytest.fixture
def open_tmp(tmp_path: Path) -> Path:
    """Make a temporary folder that every user may enter."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path


# Names of files


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "a.JPEG",
        "A.JfIf",
        "x.png",
        "x.webp",
        "x.gif",
        "x.bmp",
        "x.tif",
        "x.TIFF",
        "x.y.jpg",
        "x.avif",
        "x.HEIC",
        "x.heif",
    ],
)
def test_image_extensions_count_in_any_case(name):
    assert is_listed(name)


@pytest.mark.parametrize("name", ["a.txt", "jpg", "a.jpg.txt", "a.mov", ".a.jpg", "._a.jpg", ".jpg", "", "a.jpg~"])
def test_other_extensions_and_hidden_names_are_not_images(name):
    assert not is_listed(name)


# URIs


def test_absolute_makes_local_paths_absolute_and_drops_slashes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b/") == f"{tmp_path}/b"
    assert storage.absolute(f"file://{tmp_path}/with%20space") == f"{tmp_path}/with space"
    assert storage.absolute("/a/caf%C3%A9 %20") == "/a/caf%C3%A9 %20"
    assert storage.absolute("/") == "/"


def test_a_relative_path_in_a_deleted_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert storage.absolute("/a/b") == "/a/b"
    with pytest.raises(
        InputError, match="images: expected an absolute path, since the current folder does not exist any more"
    ):
        storage.absolute("images")


def test_absolute_keeps_bytes_that_are_not_utf8():
    assert storage.absolute(os.fsdecode(b"/a b/\xff.jpg")) == "file:///a%20b/%FF.jpg"
    assert storage.absolute("file:///a%20b/%FF.jpg") == "file:///a%20b/%FF.jpg"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("s3://b/a//b.jpg", "s3://b/a//b.jpg"),
        ("s3://b/a%20 #?+é/", "s3://b/a%20 #?+é"),
        ("S3://b/A", "s3://b/A"),
    ],
)
def test_absolute_leaves_s3_keys_alone(uri, expected):
    assert storage.absolute(uri) == expected


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///key", "s3://key:secret@b/x", "nosuchscheme://x", "a[b://x"])
def test_absolute_refuses_what_cannot_be_opened(uri):
    with pytest.raises(InputError) as caught:
        storage.absolute(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "X-Amz-Signature",
        "X-Amz-Security-Token",
        "X-Goog-Signature",
        "sig",
        "private_token",
        "api_key",
        "X-Amz-Credential",
        "X-Amz-Signatur%65",
        "x%26s%69g",
    ],
)
def test_a_uri_with_credentials_is_refused_without_showing_them(name):
    with pytest.raises(InputError, match="a URI with credentials in it") as caught:
        storage.absolute(f"https://host/a.jpg?w=1&{name}=very-hidden")
    assert "very-hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "authority", ["user:very-hid/den@host", "host:very-hidden", "host:99999", "[very-hidden", "", ":80", "host:0"]
)
def test_a_url_without_a_host_is_refused_without_showing_it(authority):
    """A password with a slash looks like a port."""
    with pytest.raises(InputError, match="a URL without a valid host and port") as caught:
        storage.absolute(f"https://{authority}/a.jpg")
    assert "very" not in str(caught.value)


@pytest.mark.parametrize("authority", ["host", "host:8080", "host:", "127.0.0.1:80", "[::1]:80", "käfer.example"])
def test_a_url_may_have_a_port(authority):
    assert storage.absolute(f"http://{authority}/a.jpg") == f"http://{authority}/a.jpg"


def test_a_query_without_credentials_is_part_of_a_uri():
    assert storage.absolute("https://host/a.jpg?w=1&key=photos/1") == "https://host/a.jpg?w=1&key=photos/1"


def test_s3_uris_split_at_the_first_slash():
    assert split_s3("s3://b//a//c ") == ("b", "/a//c ")
    assert split_s3("s3://b") == ("b", "")


@pytest.mark.parametrize(
    ("uri", "parent"),
    [
        ("/a/cats/1.jpg", "cats"),
        ("s3://b/cats/1.jpg", "cats"),
        ("s3://b/a//1.jpg", ""),
        ("1.jpg", ""),
        ("/1.jpg", ""),
        ("/a/50%25/1.jpg", "50%25"),
        ("file:///a/with%20space/%FF.jpg", "with space"),
        ("file:///a/%FF/1.jpg", "%FF"),
    ],
)
def test_parent_name(uri, parent):
    assert storage.parent_name(uri) == parent


def test_join_quotes_where_the_uri_is_quoted():
    assert storage.join("s3://b/", "a b", "c") == "s3://b/a b/c"
    assert storage.join("file:///%FF", "a b") == "file:///%FF/a%20b"
    assert storage.local_path(storage.join("file:///%FF", "a b")) == b"/\xff/a b"


# Listing: order, names


ORDERED = [
    "a-b/1.jpg",
    "a.jpg",
    "a/1.jpg",
    "a/b.jpg",
    "a0/1.jpg",
    "B.jpg",
    "a b.jpg",
    "é.jpg",
    "猫.jpg",
    "\U0001f408.jpg",
    "z/y/x.jpg",
]


def test_local_order_is_by_path_bytes(tmp_path):
    fill(tmp_path, *ORDERED)
    found = paths(tmp_path)
    assert found == sorted((f"{tmp_path}/{name}" for name in ORDERED), key=os.fsencode)


def test_s3_order_is_by_path_bytes(bucket, put):
    for name in ORDERED:
        put(f"p/{name}", b"x")
    assert paths(f"s3://{bucket}/p") == sorted((f"s3://{bucket}/p/{name}" for name in ORDERED), key=os.fsencode)


def test_s3_listing_reads_every_page(bucket):
    keys = [f"n/{i:05}.jpg" for i in range(1005)]
    store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # directly: 1,005 requests would take seconds
    for key in keys:
        store.put_object(bucket, key, b"")
    events: list[StageProgress] = []
    listing = Listing(f"s3://{bucket}/n", events.append)
    assert [entry.path for entry in listing] == [f"s3://{bucket}/{key}" for key in keys]
    assert listing.num_files == 1005
    assert events == [StageProgress("list", 1000), StageProgress("list", 1005, 1005)]


def test_odd_s3_keys_are_listed_and_read_back(bucket, put):
    # moto accepts no line breaks; a test below has another server for them
    keys = [
        *(f"p/{name}" for name in ODD_NAMES if "\n" not in name),
        "p//double.jpg",
        "p/a//b.jpg",
        "p/sp ace/+/%2F/é/x.jpg",
    ]
    for key in keys:
        put(key, key.encode())
    put("p/folder.jpg/", b"")
    put("p/", b"")
    put("p/.hidden.jpg", b"")
    put("p/.git/x.jpg", b"")
    put("p/__MACOSX/x.jpg", b"")
    put("pq/outside.jpg", b"")
    entries = list(Listing(f"s3://{bucket}/p"))
    assert {entry.path for entry in entries} == {f"s3://{bucket}/{key}" for key in keys}
    assert [entry.size_bytes for entry in entries] == [len(split_s3(entry.path)[1].encode()) for entry in entries]
    contents = {entry.path: fetched.content for entry, fetched in zip(entries, storage.fetch(entries), strict=True)}
    assert contents == {f"s3://{bucket}/{key}": key.encode() for key in keys}


def test_odd_local_names_are_listed_and_read_back(tmp_path):
    fill(tmp_path, *ODD_NAMES, "a.jpg/inside.jpg")
    entries = list(Listing(str(tmp_path)))
    assert {entry.path for entry in entries} == {f"{tmp_path}/{name}" for name in [*ODD_NAMES, "a.jpg/inside.jpg"]}
    assert [fetched.content for fetched in storage.fetch(entries)] == [
        entry.path[len(str(tmp_path)) + 1 :].encode() for entry in entries
    ]


def test_names_that_are_not_utf8_read_back(tmp_path):
    root = os.fsencode(tmp_path)
    os.mkdir(root + b"/caf\xe9 1")
    for name in (b"caf\xe9 1/%.jpg", b"\xff.jpg", b"plain.jpg"):
        Path(os.fsdecode(root + b"/" + name)).write_bytes(name)
    listing = Listing(str(tmp_path))
    entries = list(listing)
    quoted = f"file://{tmp_path}"
    assert [entry.path for entry in entries] == [
        f"{quoted}/caf%E9%201/%25.jpg",
        f"{tmp_path}/plain.jpg",
        f"{quoted}/%FF.jpg",
    ]
    assert [fetched.content for fetched in storage.fetch(entries)] == [
        b"caf\xe9 1/%.jpg",
        b"plain.jpg",
        b"\xff.jpg",
    ]
    assert [listing.relative(entry.path) for entry in entries] == ["caf%E9%201/%.jpg", "plain.jpg", "%FF.jpg"]
    assert listing.folders == {"caf%E9%201"}
    assert storage.parent_name(entries[0].path) == "caf%E9%201"


def test_a_root_that_is_not_utf8_is_listed(tmp_path):
    root = os.fsencode(tmp_path) + b"/\xff"
    os.makedirs(root + b"/cats")
    Path(os.fsdecode(root + b"/cats/1.jpg")).write_bytes(b"x")
    listing = Listing(storage.absolute(os.fsdecode(root)))
    (entry,) = listing
    assert entry.path == f"file://{tmp_path}/%FF/cats/1.jpg"
    assert listing.relative(entry.path) == "cats/1.jpg"
    assert listing.folders == {"cats"}


def test_hidden_names_are_ignored(tmp_path):
    fill(
        tmp_path,
        "a.jpg",
        ".a.jpg",
        "._a.jpg",
        "__MACOSX/a.jpg",
        ".ipynb_checkpoints/a.jpg",
        "d/.git/a.jpg",
        "d/b.JPG",
        "d/b.txt",
    )
    listing = Listing(str(tmp_path))
    assert [entry.path for entry in listing] == [f"{tmp_path}/a.jpg", f"{tmp_path}/d/b.JPG"]
    assert listing.folders == {"d"}
    assert listing.other_files == {".txt": 1}


OTHER = ["clip.MOV", "b/clip.mov", "notes.txt", "README", "b/archive.tar.gz", "b/.hidden.txt", ".git/x.txt", "x."]


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_other_files_are_counted_by_extension(kind, tmp_path, bucket, put, memory):
    roots = {"local": str(tmp_path), "s3": f"s3://{bucket}/p", "memory": memory}
    for name in [*OTHER, "b/a.jpg"]:
        storage.write_bytes(storage.join(roots[kind], name), b"x")
    listing = Listing(roots[kind])
    assert len(list(listing)) == 1
    assert listing.other_files == {".mov": 2, ".txt": 1, "": 1, ".gz": 1, ".": 1}


def test_other_files_before_the_start_are_not_counted_again(tmp_path):
    fill(tmp_path, "a.txt", "b.jpg", "c.txt")
    listing = Listing(str(tmp_path), start_after=f"{tmp_path}/b.jpg")
    assert list(listing) == []
    assert listing.other_files == {".txt": 1}


@pytest.mark.parametrize(
    ("num_images", "other", "text"),
    [
        (0, {}, "looked at 0 files, 0 images"),
        (0, {".mov": 310, ".txt": 2}, "looked at 312 files, 0 images: 310 .mov, 2 .txt"),
        (1, {"": 1200}, "looked at 1,201 files, 1 image: 1,200 without extension"),
        (0, {f".{i}": 9 - i for i in range(7)}, "looked at 42 files, 0 images: 9 .0, 8 .1, 7 .2, 6 .3, 5 .4, 7 others"),
    ],
)
def test_other_files_are_described(num_images, other, text):
    assert Listing("/x", num_files=num_images, other_files=Counter(other)).describe_other_files() == text


def test_a_files_table_has_the_entries_in_order():
    entries = [Entry("/b.jpg", 3, "v"), Entry("/a.jpg")]
    table = storage.build_files_table(iter(entries))
    assert table.schema == FILES
    assert [Entry(**row) for row in table.to_pylist()] == entries


def test_folders_are_collected_three_levels_deep_even_when_empty(tmp_path):
    (tmp_path / "train" / "empty").mkdir(parents=True)
    fill(tmp_path, "train/cats/deep/er/1.jpg")
    listing = Listing(str(tmp_path))
    assert len(list(listing)) == 1
    assert listing.folders == {"train", "train/cats", "train/cats/deep", "train/empty"}


def test_folders_are_collected_only_on_request(tmp_path):
    fill(tmp_path, "train/cats/1.jpg")
    listing = Listing(str(tmp_path), collect_folders=False)
    assert (len(list(listing)), listing.folders) == (1, set())


def test_folders_are_collected_three_levels_deep_on_s3(bucket, put):
    put("d/train/cats/deep/er/1.jpg", b"x")
    put("d/train/empty/", b"")
    listing = Listing(f"s3://{bucket}/d")
    assert len(list(listing)) == 1
    assert listing.folders == {"train", "train/cats", "train/cats/deep", "train/empty"}


def test_one_file_is_a_root_whatever_its_extension(tmp_path):
    fill(tmp_path, "picture.data")
    (entry,) = Listing(f"{tmp_path}/picture.data")
    assert (entry.path, entry.size_bytes) == (f"{tmp_path}/picture.data", 12)


def test_one_object_is_a_root(bucket, put):
    put("p/one.jpg", b"12345")
    put("p/one.jpg.bak.jpg", b"")
    (entry,) = Listing(f"s3://{bucket}/p/one.jpg")
    assert entry == Entry(f"s3://{bucket}/p/one.jpg", 5, hashlib.md5(b"12345").hexdigest())


def test_an_empty_prefix_lists_nothing(bucket):
    assert paths(f"s3://{bucket}/nothing") == []


def test_a_missing_root_is_an_input_error(tmp_path, bucket):
    with pytest.raises(InputError, match="no such file or folder"):
        paths(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot list s3://no-such-bucket-here/p"):
        paths("s3://no-such-bucket-here/p")


# Listing: links


def test_linked_files_count(tmp_path):
    fill(tmp_path, "in/a.jpg", "out/target")
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "out" / "target")
    (tmp_path / "in" / "again.jpg").symlink_to("a.jpg")
    assert paths(tmp_path / "in") == [f"{tmp_path}/in/{name}.jpg" for name in ("a", "again", "link")]


def test_a_broken_link_is_an_entry_that_is_not_found(tmp_path):
    (tmp_path / "broken.jpg").symlink_to("absent")
    (entry,) = Listing(str(tmp_path))
    assert entry == Entry(f"{tmp_path}/broken.jpg")
    assert storage.fetch([entry])[0].status == "not_found"


def test_a_link_to_itself_does_not_stop_the_listing(tmp_path):
    fill(tmp_path, "a.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "loop").symlink_to("loop")
    listing = Listing(str(tmp_path))
    entries = list(listing)
    assert [entry.path for entry in entries] == [f"{tmp_path}/a.jpg", f"{tmp_path}/loop.jpg"]
    assert storage.fetch(entries)[1].status == "read_error"
    assert listing.unlisted == {}


LINKS = {
    "to the parent": {"in/up": ".."},
    "to its own folder": {"in/d/here": "."},
    "to the root": {"in/d/root": "../../in"},
    "two to each other's folders": {"in/d/e": "../e", "in/e/d": "../d"},
    "into the tree": {"in/x": "d"},
    "to an outside folder": {"in/o": "../out"},
    "twice to an outside folder": {"in/o1": "../out", "in/o2": "../out"},
    "to an outside folder that links back": {"in/o": "../out", "out/back": "../in"},
    "to outside folders that link to each other": {"in/o": "../out", "out/p": "../out2", "out2/o": "../out"},
    "to an outside folder and into it": {"in/a": "../out/deep", "in/b": "../out"},
    "into an outside folder, then to it": {"in/b": "../out", "in/c": "../out/deep"},
    "to the folder above the root": {"in/zz": "../../world"},
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
def test_linked_folders_give_every_real_file_once(tmp_path, links):
    world = tmp_path / "world"
    fill(world, "in/a.jpg", "in/d/b.jpg", "in/e/c.jpg", "out/o.jpg", "out/deep/p.jpg", "out2/q.jpg")
    for name, target in links.items():
        (world / name).symlink_to(target)
    listing = Listing(str(world / "in"))
    found = [entry.path for entry in listing]
    real = [os.path.realpath(path) for path in found]
    assert len(real) == len(set(real))
    reached = {f"{world}/in/{name}" for name in ("a.jpg", "d/b.jpg", "e/c.jpg")}
    assert reached <= set(real)
    targets = " ".join(links.values())
    if "out" in targets or "world" in targets or ".." in links.values():
        assert {f"{world}/out/o.jpg", f"{world}/out/deep/p.jpg"} <= set(real)
    assert found == sorted(found, key=os.fsencode)
    assert listing.unlisted == {}


def test_a_link_to_a_hidden_folder_is_followed(tmp_path):
    fill(tmp_path, ".store/cats/1.jpg", ".store/cats/sub/2.jpg", ".store/.secret/3.jpg")
    (tmp_path / "cats").symlink_to(".store/cats")
    assert paths(tmp_path) == [f"{tmp_path}/cats/1.jpg", f"{tmp_path}/cats/sub/2.jpg"]


def test_a_linked_root_is_listed_under_its_own_name(tmp_path):
    fill(tmp_path, "real/d/a.jpg")
    (tmp_path / "root").symlink_to("real")
    (tmp_path / "real" / "d" / "back").symlink_to(tmp_path / "root")
    assert paths(tmp_path / "root") == [f"{tmp_path}/root/d/a.jpg"]


def test_a_pipe_is_neither_listed_nor_read(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    listing = Listing(str(tmp_path))
    assert list(listing) == []
    assert listing.unlisted == {f"{tmp_path}/x.jpg": "not a regular file"}
    (fetched,) = storage.fetch([Entry(f"{tmp_path}/x.jpg")])
    assert (fetched.status, fetched.error) == ("read_error", "not a regular file")


def test_a_link_to_what_is_no_regular_file_is_a_row(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in").mkdir()
    for name, target in (("a", tmp_path / "pipe"), ("b", "/dev/zero"), ("c", "/dev/tty"), ("d", "/proc/self/environ")):
        (tmp_path / f"in/{name}.jpg").symlink_to(target)
    listing = Listing(f"{tmp_path}/in")
    fetched = storage.fetch(list(listing), 1000)
    assert listing.unlisted == {}
    assert [file.status for file in fetched[:3]] == ["read_error"] * 3
    assert {file.error for file in fetched[:2]} == {"not a regular file"}
    assert fetched[3].content is None  # it was listed with 0 bytes


def test_an_unreadable_folder_is_unlisted(open_tmp):
    fill(open_tmp, "a.jpg", "secret/b.jpg", "z/c.jpg")
    (open_tmp / "secret").chmod(0o700)

    def look() -> object:
        listing = Listing(str(open_tmp))
        return [entry.path for entry in listing], listing.unlisted

    found = [f"{open_tmp}/a.jpg", f"{open_tmp}/z/c.jpg"]
    assert as_nobody(look) == str((found, {f"{open_tmp}/secret": "Permission denied"}))


def test_a_very_deep_folder_is_listed(tmp_path):
    deep = "/".join("a" * 400) + "/deep.jpg"
    fill(tmp_path, "z.jpg", deep)
    listing = Listing(str(tmp_path))
    assert [entry.path for entry in listing] == [f"{tmp_path}/{deep}", f"{tmp_path}/z.jpg"]
    assert listing.unlisted == {}


# Reading


def test_fetch_returns_content_and_statuses_in_order_from_both_stores(tmp_path, bucket, put):
    fill(tmp_path, "a.jpg", "size.jpg", "time.jpg", "gone.jpg")
    put("a.jpg", b"s3 a")
    put("etag.jpg", b"old!")
    local = {entry.path.rpartition("/")[2]: entry for entry in Listing(str(tmp_path))}
    remote = {entry.path.rpartition("/")[2]: entry for entry in Listing(f"s3://{bucket}")}
    (tmp_path / "size.jpg").write_bytes(b"longer than before")
    os.utime(tmp_path / "time.jpg", ns=(1, 1))
    (tmp_path / "gone.jpg").unlink()
    put("etag.jpg", b"new!")
    entries = [
        remote["a.jpg"],
        local["a.jpg"],
        local["size.jpg"],
        remote["etag.jpg"],
        local["time.jpg"],
        local["gone.jpg"],
        Entry(f"s3://{bucket}/absent.jpg"),
        Entry("s3://no-such-bucket-here/a.jpg"),
        Entry(str(tmp_path)),
        Entry(f"{tmp_path}/a.jpg/inside.jpg"),
        Entry(f"{tmp_path}/zero\0byte.jpg"),
        remote["a.jpg"],
    ]
    fetched = storage.fetch(entries)
    assert [row.status for row in fetched] == [
        "ok",
        "ok",
        "changed",
        "changed",
        "changed",
        "not_found",
        "not_found",
        "not_found",
        "read_error",
        "not_found",
        "read_error",
        "ok",
    ]
    assert [row.content for row in fetched if row.status == "ok"] == [b"s3 a", b"a.jpg", b"s3 a"]
    assert all(row.error for row in fetched if row.status != "ok")
    assert all(row.error is None for row in fetched if row.status == "ok")


def test_many_concurrent_reads_return_in_order(bucket, put):
    keys = [f"{i:03}.jpg" for i in range(150)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: put(key, key.encode()), keys))
    backwards = [Entry(f"s3://{bucket}/{key}") for key in reversed(keys)]
    assert [row.content for row in storage.fetch(backwards)] == [key.encode() for key in reversed(keys)]


def test_fetching_no_files_returns_no_rows():
    assert storage.fetch([]) == []


def test_a_file_of_another_user_is_access_denied(open_tmp):
    fill(open_tmp, "a.jpg")
    (open_tmp / "a.jpg").chmod(0o600)
    assert as_nobody(lambda: storage.fetch([Entry(f"{open_tmp}/a.jpg")])[0].status) == "access_denied"


def test_read_bytes_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=rf"cannot read {tmp_path}/absent: No such file"):
        storage.read_bytes(f"{tmp_path}/absent")


# S3 that fails: a server with one fixed response, read by a separate process because clients are cached


@pytest.fixture
def failing_s3() -> Iterator[Callable[..., str]]:
    """Start servers with one response to every request: start(status, body, number of bytes sent) -> address."""
    servers = []
    paths: list[str] = []

    def start(status: int, body: bytes, num_sent: int | None = None, repaired_after: int | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            requests = 0

            def do_GET(self) -> None:
                type(self).requests += 1
                paths.append(self.path)
                broken = repaired_after is None or self.requests <= repaired_after
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"e"')
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body[:num_sent] if broken else body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    start.paths = paths
    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def run_python(code: str, **environment: str) -> str:
    """Run code that uses storage in a separate process; return what it printed."""
    head = "from catsdogs import storage\nfrom catsdogs.errors import *\n"
    return run_forked(head + textwrap.dedent(code), **environment).strip()


EVERY_CALL = """
    calls = {
        "fetch": lambda: storage.fetch([storage.Entry("s3://b/x.jpg")]),
        "list": lambda: list(storage.Listing("s3://b/p")),
        "names": lambda: storage.list_names("s3://b/p"),
        "write": lambda: storage.write_bytes("s3://b/x", b""),
    }
    for name, call in calls.items():
        try:
            print(name, call())
        except CatsdogsError as error:
            print(name, type(error).__name__, "renew them" in str(error))
"""
STOPPED = "\n".join(f"{name} RunError True" for name in ("fetch", "list", "names", "write"))


def xml_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()


def test_expired_credentials_stop_the_job(failing_s3):
    address = failing_s3(403, xml_error("ExpiredToken"))
    code = EVERY_CALL.replace('"write": lambda: storage.write_bytes("s3://b/x", b""),', "")
    assert run_python(code, AWS_ENDPOINT_URL_S3=address) == STOPPED.removesuffix("\nwrite RunError True")


def test_missing_credentials_stop_the_job(failing_s3):
    address = failing_s3(200, b"")
    code = "import os\nfor name in ('ACCESS_KEY_ID', 'SECRET_ACCESS_KEY'):\n    del os.environ['AWS_' + name]\n"
    assert run_python(code + textwrap.dedent(EVERY_CALL), AWS_ENDPOINT_URL_S3=address) == STOPPED


def test_a_refused_object_is_a_row_but_a_refused_listing_is_an_error(failing_s3):
    address = failing_s3(403, xml_error("AccessDenied"))
    code = """
        print(storage.fetch([storage.Entry("s3://b/x.jpg")])[0].status)
        for call in (lambda: list(storage.Listing("s3://b/p")), lambda: storage.list_names("s3://b/p")):
            try:
                call()
            except InputError as error:
                print("cannot list s3://b/p" in str(error))
    """
    assert run_python(code, AWS_ENDPOINT_URL_S3=address) == "access_denied\nTrue\nTrue"


def test_a_key_with_a_line_break_is_listed_and_read_back(failing_s3):
    page = b"""<?xml version="1.0"?><ListBucketResult><EncodingType>url</EncodingType>
        <IsTruncated>false</IsTruncated><Contents><Key>p/a%0Ab.jpg</Key><Size>SIZE</Size><ETag>"e"</ETag></Contents></ListBucketResult>"""
    page = page.replace(b"SIZE", str(len(page) - 1).encode())  # three digits
    address = failing_s3(200, page)
    code = """
        (entry,) = storage.Listing("s3://b/p")
        print(entry, len(storage.fetch([entry])[0].content))
    """
    listed = f"Entry(path='s3://b/p/a\\nb.jpg', size_bytes={len(page)}, version='e')"
    assert run_python(code, AWS_ENDPOINT_URL_S3=address) == f"{listed} {len(page)}"
    assert failing_s3.paths[-1] == "/b/p/a%0Ab.jpg"


def test_a_body_that_breaks_off_is_retried(failing_s3):
    address = failing_s3(200, b"whole", num_sent=3, repaired_after=2)
    code = 'print(storage.fetch([storage.Entry("s3://b/x.jpg", 5, "e")])[0])'
    found = "Fetched(status='ok', content=b'whole', error=None, version='e', retries=2)"
    assert run_python(code, AWS_ENDPOINT_URL_S3=address) == found


@pytest.mark.parametrize("error", [NoCredentialsError(), UnauthorizedSSOTokenError()])
def test_missing_and_expired_logins_stop_the_job(error):
    with pytest.raises(RunError, match=type(error).__name__):
        check_credentials(error)


def test_other_errors_do_not_stop_the_job():
    check_credentials(OSError(errno.EIO, "no"))


# Writing


@pytest.mark.parametrize("content", [b"", b"content", bytes(range(256)) * 1000], ids=len)
def test_local_files_are_written_and_replaced(tmp_path, content):
    uri = f"{tmp_path}/new/folder/é 1.bin"
    storage.write_bytes(uri, b"before")
    storage.write_bytes(uri, content)
    assert storage.read_bytes(uri) == content
    assert storage.list_names(f"{tmp_path}/new/folder") == ["é 1.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        storage.write_bytes(f"{tmp_path}/x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    storage.write_bytes(f"{tmp_path}/{'é' * 127}x", b"1")
    assert len(storage.list_names(str(tmp_path))) == 1


def test_a_folder_in_place_of_the_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/x: Is a directory"):
        storage.write_bytes(f"{tmp_path}/x", b"1")
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    fill(tmp_path, "x")
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/x/y"):
        storage.write_bytes(f"{tmp_path}/x/y", b"1")
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/x/y"):
        storage.create_bytes(f"{tmp_path}/x/y", b"")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    fill(tmp_path, "x")
    code = f"""
        import os, resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            storage.write_bytes("{tmp_path}/x", b"1" * 5000)
        except RunError as error:
            print(error)
        print(os.listdir("{tmp_path}"), storage.read_bytes("{tmp_path}/x"))
    """
    assert run_python(code) == f"cannot write {tmp_path}/x: File too large\n['x'] b'x'"


def test_a_file_that_is_being_written_is_hidden(tmp_path, monkeypatch):
    seen, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.extend(paths(tmp_path)), rename(*names)))
    storage.write_bytes(f"{tmp_path}/x.jpg", b"1")
    assert seen == []
    assert paths(tmp_path) == [f"{tmp_path}/x.jpg"]


def test_s3_write_read_list_remove(bucket):
    root = f"s3://{bucket}/runs/a b%"
    assert storage.list_names(root) == []
    assert not storage.exists(root)
    for name in ("z", "é #?"):
        storage.write_bytes(storage.join(root, name), b"1")
        storage.write_bytes(storage.join(root, name), name.encode())
    storage.write_bytes(storage.join(root, "sub", "x"), b"")
    assert storage.list_names(root) == ["sub", "z", "é #?"]
    assert storage.read_bytes(storage.join(root, "é #?")) == "é #?".encode()
    assert not storage.exists(root)
    assert storage.exists(storage.join(root, "z"))
    assert not storage.exists(storage.join(root, "z", "config.json"))
    storage.remove(storage.join(root, "z"))
    storage.remove(storage.join(root, "z"))
    assert storage.list_names(root) == ["sub", "é #?"]


def test_a_missing_bucket_cannot_be_written_to(bucket):
    with pytest.raises(InputError, match="no such bucket"):
        storage.list_names("s3://no-such-bucket-here/x")
    with pytest.raises(RunError, match="cannot write s3://no-such-bucket-here/x"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"")


def test_local_exists_list_names_remove(tmp_path):
    fill(tmp_path, "b", "a/x", ".c")
    assert storage.list_names(str(tmp_path)) == [".c", "a", "b"]
    assert storage.list_names(f"{tmp_path}/absent") == []
    with pytest.raises(InputError, match="expected a folder, found a file"):
        storage.list_names(f"{tmp_path}/b")
    assert storage.exists(f"{tmp_path}/a")
    assert not storage.exists(f"{tmp_path}/absent")
    storage.remove(f"{tmp_path}/b")
    storage.remove(f"{tmp_path}/b")
    assert storage.list_names(str(tmp_path)) == [".c", "a"]


def test_a_folder_that_must_not_be_listed_is_an_input_error(open_tmp):
    (open_tmp / "secret").mkdir(mode=0o700)

    def look() -> object:
        try:
            return storage.list_names(f"{open_tmp}/secret")
        except InputError as error:
            return error

    assert "Permission denied" in as_nobody(look)


# Other schemes, through fsspec


@pytest.fixture
def memory() -> Iterator[str]:
    """Start from an empty `memory://` store."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://root"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_any_scheme_of_fsspec_lists_reads_and_writes(memory):
    names = ["b.jpg", "a/x.PNG", "a b/y.jpg", "a.jpg", ".hidden.jpg", ".git/z.jpg", "c.txt"]
    for name in names:
        storage.write_bytes(storage.join(memory, name), name.encode())
    listing = Listing(storage.absolute(memory + "/"))
    entries = list(listing)
    assert [listing.relative(entry.path) for entry in entries] == ["a b/y.jpg", "a.jpg", "a/x.PNG", "b.jpg"]
    assert [row.content.decode() for row in storage.fetch(entries)] == [
        "a b/y.jpg",
        "a.jpg",
        "a/x.PNG",
        "b.jpg",
    ]
    assert listing.folders == {"a", "a b"}
    assert storage.list_names(memory) == [".git", ".hidden.jpg", "a", "a b", "a.jpg", "b.jpg", "c.txt"]
    storage.write_bytes(f"{memory}/a.jpg", b"longer than before")
    storage.remove(f"{memory}/b.jpg")
    assert [row.status for row in storage.fetch(entries)] == ["ok", "changed", "ok", "not_found"]


def test_any_error_of_an_fsspec_file_system_is_a_row(memory, monkeypatch):
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: 1 / 0)
    (row,) = storage.fetch([Entry(f"{memory}/a.jpg")])
    assert (row.status, row.error) == ("read_error", "division by zero")


def test_a_bug_in_reading_is_no_row(memory, monkeypatch):
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: widht)  # noqa: F821
    with pytest.raises(NameError, match="widht"):
        storage.fetch([Entry(f"{memory}/a.jpg")])


def test_a_root_with_two_colons_is_refused(memory):
    with pytest.raises(InputError, match="expected a URI without '::'"):
        paths(f"{memory}/a::b")
