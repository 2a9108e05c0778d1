"""Each peer as its own documentation does it, and tuned; every one prints `N/TOTAL` after a batch."""
