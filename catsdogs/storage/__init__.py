"""URI -> file system and path; listing; reading image bytes; atomic writes. No Ray.

A URI is a local path, `s3://bucket/key`, or any other scheme that fsspec opens. An S3 key stands in its URI
as it is: nothing in it is quoted, the first `/` after the bucket ends the bucket. A local path stands as it
is, absolute; a name that is not UTF-8 stands as a `file://` URI with its bytes percent-encoded.
"""

from catsdogs.storage.listing import EXTENSIONS, Entry, Listing, is_hidden, is_image
from catsdogs.storage.reading import Fetched, fetch, fetch_ahead, listed_bytes, read_bytes, read_versioned
from catsdogs.storage.uris import (
    absolute,
    exists,
    fs_path,
    is_local,
    join,
    list_names,
    local_path,
    parent_name,
)
from catsdogs.storage.writing import create_bytes, remove, remove_temporaries, replace_bytes, write_bytes

__all__ = [
    "EXTENSIONS",
    "Entry",
    "Fetched",
    "Listing",
    "absolute",
    "create_bytes",
    "exists",
    "fetch",
    "fetch_ahead",
    "fs_path",
    "is_hidden",
    "is_image",
    "is_local",
    "join",
    "list_names",
    "listed_bytes",
    "local_path",
    "parent_name",
    "read_bytes",
    "read_versioned",
    "remove",
    "remove_temporaries",
    "replace_bytes",
    "write_bytes",
]
