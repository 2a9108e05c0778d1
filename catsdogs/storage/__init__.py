"""URIs, file systems, listing, reading and atomic writes. No Ray.

A URI is a local path, `s3://bucket/key`, or has another scheme of `SCHEMES`, which fsspec opens. An S3 key is
not quoted: the first `/` after the bucket ends the bucket, everything behind it is the key. A local path is absolute
and not quoted; a name that is not UTF-8 is a `file://` URI with its bytes percent-encoded.

Functions that make S3 requests raise RunError if the credentials are missing, wrong or expired, or if the store does
not respond.

    uris.py          parse URIs, list the names in a folder
    entries.py       listed files, and which names are listed
    listing.py       list the image files of a folder or prefix in order
    reading.py       read a file: the content, or a status
    fetching.py      read the files of a task, ahead and within its limits
    writing.py       atomic and conditional writes
    objects.py       read and write S3 objects
    s3_listing.py    list S3 prefixes
    s3_ranges.py     list several ranges of a large prefix at once
    s3.py            S3 client, requests and error classes
    s3_gets.py       GETs of S3 objects, the short way
    other_stores.py  HTTP, and the other schemes of fsspec, with retries
    http_store.py    one request by HTTP
    http_listing.py  list a folder of a web server
    retrying.py      which requests are retried, and for how long
    event_loop.py    where requests run, and what a process that ends does not wait for
    limits.py        limits of size and time
"""

from catsdogs.storage.entries import EXTENSIONS, Entry, build_files_table
from catsdogs.storage.event_loop import call_in_thread
from catsdogs.storage.fetching import fetch, fetch_ahead, listed_bytes
from catsdogs.storage.limits import MAX_IMAGE_BYTES
from catsdogs.storage.listing import Listing, find_entry
from catsdogs.storage.other_stores import SCHEMES
from catsdogs.storage.reading import Fetched, read_bytes, read_versioned
from catsdogs.storage.retrying import limit_retries
from catsdogs.storage.uris import (
    absolute,
    exists,
    find_scheme,
    is_local,
    join,
    list_names,
    local_path,
    parent,
    parent_name,
)
from catsdogs.storage.writing import (
    create_bytes,
    is_temporary,
    read_version,
    remove,
    remove_empty_folder,
    remove_files,
    remove_temporaries,
    replace_bytes,
    write_bytes,
    write_files,
    write_over,
)

__all__ = [
    "EXTENSIONS",
    "MAX_IMAGE_BYTES",
    "SCHEMES",
    "Entry",
    "Fetched",
    "Listing",
    "absolute",
    "build_files_table",
    "call_in_thread",
    "create_bytes",
    "exists",
    "fetch",
    "fetch_ahead",
    "find_entry",
    "find_scheme",
    "is_local",
    "is_temporary",
    "join",
    "limit_retries",
    "list_names",
    "listed_bytes",
    "local_path",
    "parent",
    "parent_name",
    "read_bytes",
    "read_version",
    "read_versioned",
    "remove",
    "remove_empty_folder",
    "remove_files",
    "remove_temporaries",
    "replace_bytes",
    "write_bytes",
    "write_files",
    "write_over",
]
