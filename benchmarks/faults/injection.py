"""The faults of the S3 proxy: which kinds exist, which requests they hit, how often they did."""

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from benchmarks.faults.wire import Head

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
RESPONSES = {
    "slow_down": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    "access_denied": (403, "Forbidden", "AccessDenied", "Access Denied"),
    "no_such_key": (404, "Not Found", "NoSuchKey", "The specified key does not exist."),
    "expired_token": (400, "Bad Request", "ExpiredToken", "The provided token has expired."),
}
BODIES = {
    "reset": "the connection is reset after `at_byte` bytes of the body",
    "cut": "the connection is closed after `at_byte` bytes, fewer than Content-Length",
    "short": "the body ends after `at_byte` bytes, and Content-Length matches",
    "slow": "the body is sent at one byte per second",
    "replaced": "the content is that of the key `instead`, as after a PUT since the listing",
}


class Request(Head):
    """One request to S3, with a path-style URL."""

    def __init__(self, head: Head) -> None:
        super().__init__(head.first_line, head.headers)
        self.method, self.target, _ = self.first_line.split(" ", 2)
        url = urlsplit(self.target)
        self.bucket, _, self.key = unquote(url.path).lstrip("/").partition("/")
        self.kind = self._kind()

    def _kind(self) -> str:
        if self.method != "GET":
            return self.method.lower()
        if not self.key:
            return "list"
        return "image" if self.key.lower().endswith(IMAGE_SUFFIXES) else "get"


@dataclass
class Fault:
    """A fault and the requests that it hits: those that meet all of the given conditions.

    Attributes:
        what: a key of RESPONSES or BODIES.
        first: only the first N requests of each key.
        total: at most N requests.
        after_images: only after N image GETs.
        active: whether the fault is switched on.
        injected: how often it was injected.
    """

    what: str
    kinds: Collection[str] = ()
    methods: Collection[str] = ()
    keys: Collection[str] = ()
    first: int | None = None
    total: int | None = None
    probability: float = 1.0
    after_images: int = 0
    at_byte: int = 0
    instead: str = ""
    active: bool = True
    injected: int = 0
    _seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        assert self.what in RESPONSES.keys() | BODIES.keys(), self.what

    def should_inject(self, request: "Request", num_images: int, rng: random.Random) -> bool:
        """Decide whether to hit a request, and count it."""
        matches = (
            self.active
            and num_images >= self.after_images
            and (not self.kinds or request.kind in self.kinds)
            and (not self.methods or request.method in self.methods)
            and (not self.keys or request.key in self.keys)
            and (self.total is None or self.injected < self.total)
        )
        if not matches:
            return False
        self._seen[request.key] += 1
        if (self.first is not None and self._seen[request.key] > self.first) or rng.random() >= self.probability:
            return False
        self.injected += 1
        return True


@dataclass
class Counts:
    """The number of requests and of injected faults."""

    by_method: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    gets_by_key: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
