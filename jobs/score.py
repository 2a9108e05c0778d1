"""`python -m jobs.score` takes the flags of `catsdogs score`."""

import sys

from catsdogs.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
