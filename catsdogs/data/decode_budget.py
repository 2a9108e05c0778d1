"""Limit the time to decode the images of a batch, so that a batch of slow images ends.

Ray Data ends a run whose stages return no batch for `runtime.NO_PROGRESS_TIMEOUT_S`. Without a common limit, 60 images
of 30 s each in one batch would end each attempt to score them.
"""

from dataclasses import dataclass

MAX_DECODE_S = 30.0  # for one image
# For a batch, in addition to one image and the start of child processes: less than half of NO_PROGRESS_TIMEOUT_S, whose
# other half is for reading the files.
MAX_BATCH_DECODE_S = 720.0
GRACE_S = 0.5  # after the limit, at most, for the child's own timer to end it: an image may have switched that off
MIN_LIMIT_S = 0.01  # more than ten times what an ordinary image takes


@dataclass(slots=True)
class DecodeBudget:
    """What the images of a batch may still take: a reserve for slow ones, and `share_s` for each of them.

    While the reserve lasts, the limit for an image is MAX_DECODE_S, afterwards `share_s`. What an image leaves of its
    share is added to the reserve.
    """

    reserve_s: float
    share_s: float

    @classmethod
    def for_batch(cls, num_files: int) -> "DecodeBudget":
        """Give one half of MAX_BATCH_DECODE_S to the reserve, the other to the images in equal shares."""
        half_s = MAX_BATCH_DECODE_S / 2
        return cls(half_s, max(MIN_LIMIT_S, half_s / max(1, num_files)))

    @property
    def is_spent(self) -> bool:
        """Whether the reserve is used up."""
        return self.reserve_s <= 0

    @property
    def limit_s(self) -> float:
        """Limit for the next image."""
        return min(MAX_DECODE_S, self.share_s) if self.is_spent else MAX_DECODE_S

    @property
    def wait_s(self) -> float:
        """Limit for the wait for the next image."""
        return self.limit_s + min(GRACE_S, self.limit_s / 4)

    def charge(self, seconds: float, num_files: int) -> None:
        """Subtract the time that was taken, and add the shares of the images that are done."""
        self.reserve_s += num_files * self.share_s - seconds

    def describe_excess(self) -> str:
        """Name the limit that the next image exceeds."""
        if self.limit_s == MAX_DECODE_S:
            return f"decoding took more than {MAX_DECODE_S:g} s"
        return (
            f"decoding took more than {self.limit_s:.3g} s, the limit for each further image of a batch "
            f"whose slow images took {MAX_BATCH_DECODE_S / 2:g} s"
        )
