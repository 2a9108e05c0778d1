"""List a folder of a web server by the links in its pages, such as the index pages of nginx, Apache and Python.

Only links that lie below the folder are followed. One listing has limits, because a server may make up pages without
end.
"""

import asyncio
import html
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urljoin

from catsdogs.storage.event_loop import run_sync
from catsdogs.storage.http_store import StoreError, open_url, read_body
from catsdogs.storage.other_stores import filesystem, with_retries

MAX_PAGES = 10_000  # folders of one listing
MAX_PAGE_BYTES = 16 << 20  # of one page, about 200,000 links
MAX_LINKS = 2_000_000  # of one listing, which is sorted in memory
LINK = re.compile(r"""<a\s[^<>]{0,500}?href\s{0,9}=\s{0,9}["']?([^"'<>\s]{1,4000})""", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass
class HttpListing:
    """The files below a URL, and the folders that could not be listed, with the reason."""

    files: set[str] = field(default_factory=set)
    unlisted: dict[str, str] = field(default_factory=dict)


def list_files(uri: str) -> HttpListing:
    """List all files below a URL; a URL that is no page is listed as the only file.

    Raises:
        OSError: the URL cannot be read, or the listing exceeds a limit.
    """
    return run_sync(_list_files, uri)


def list_page(uri: str) -> list[str]:
    """List the URLs of the files and folders directly in a folder; those of folders end in a slash."""
    links = run_sync(_read_links, uri) or []
    return [link for link in links if link.rstrip("/").count("/") == uri.rstrip("/").count("/") + 1]


async def _list_files(root: str) -> HttpListing:
    listing = HttpListing()
    links = await _read_links(root)
    if links is None:
        listing.files.add(root)
    pending, listed = list(links or ()), {f"{root}/"}
    while pending:
        link = pending.pop()
        if not link.endswith("/"):
            listing.files.add(link)
        elif link not in listed:
            listed.add(link)
            pending += await _read_links_of_folder(link, listing) if len(listed) <= MAX_PAGES else ()
        if len(listed) > MAX_PAGES or len(listing.files) + len(pending) > MAX_LINKS:
            limits = f"more than {MAX_PAGES:,} folders or {MAX_LINKS:,} links"
            raise StoreError(f"{limits}; choose a folder below it, or a path list")
    return listing


async def _read_links_of_folder(uri: str, listing: HttpListing) -> list[str]:
    try:
        return await _read_links(uri) or []
    except OSError as error:
        logger.debug("cannot list %s", uri, exc_info=True)
        listing.unlisted[uri] = str(error)
        return []


async def _read_links(uri: str) -> list[str] | None:
    """Read the links in the page of a folder to what lies below it; None if it is no page."""

    async def read_page() -> bytes | None:
        async with open_url(filesystem(uri), uri) as response:
            is_page = "html" in response.headers.get("Content-Type", "").lower()
            return await read_body(response, MAX_PAGE_BYTES) if is_page else None

    page, _ = await with_retries(read_page, f"GET {uri}")
    if page is None:
        return None
    text = page.decode("utf-8", "replace")
    return await asyncio.to_thread(lambda: sorted(set(_iter_links(uri.rstrip("/") + "/", text))))


def _iter_links(base: str, text: str) -> Iterator[str]:
    """Yield the absolute URLs below a base URL; links with a query sort an index page, or call a program."""
    for match in LINK.finditer(text):
        try:
            link = urljoin(base, html.unescape(match[1])).partition("#")[0]
        except ValueError:  # such as http://[
            continue
        if link.startswith(base) and link != base and "?" not in link and "/.." not in unquote(link):
            yield link
