"""`python -m jobs.train` takes the flags of `catsdogs train`."""

import sys

from catsdogs.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
