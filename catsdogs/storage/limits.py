"""Limits of what is read, so that no store, list or file takes all memory or all time."""

MAX_FILE_BYTES = 2 << 30  # of a file that is read whole; 100,000 rows with embeddings, the largest part, take 0.8 GB
MAX_IMAGE_BYTES = 512 << 20  # of an encoded image: 178,956,970 pixels, the default of --max-pixels, without compression
# From the start of a request to its end with all retries, and for all reads of one decoding task. Half of the time
# that a run may take without progress, `data.runtime.NO_PROGRESS_TIMEOUT_S`; the other half is for decoding.
DEADLINE_S = 900.0
LISTING_DEADLINE_S = 6 * 3600.0  # for a listing that a store's package makes in one call: 100 million files at 5,000/s
BODY_TIMEOUT_S, MIN_BODY_BYTES_PER_S = 20.0, 100_000  # a body of n bytes may take 20 s + n / 100,000 s


class TooLongError(OSError):
    """A file is larger than the limit; `num_bytes` is its size, or how much of it was read."""

    def __init__(self, num_bytes: int, limit_bytes: int) -> None:
        limit = f"{limit_bytes >> 20} MiB" if limit_bytes >= 1 << 20 else f"{limit_bytes} bytes"
        super().__init__(f"{num_bytes} bytes, more than the {limit} that are read of such a file")
        self.num_bytes = num_bytes


def check_length(num_bytes: int, limit_bytes: int) -> None:
    """Raise TooLongError if a file is larger than the limit."""
    if num_bytes > limit_bytes:
        raise TooLongError(num_bytes, limit_bytes)
