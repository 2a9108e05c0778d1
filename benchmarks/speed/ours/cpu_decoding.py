"""`catsdogs score` on a GPU that decodes no JPEGs: CPUs do."""

import sys

from catsdogs import data
from catsdogs.cli import main

if __name__ == "__main__":
    vars(data)["gpus_decode_jpegs"] = lambda: False
    sys.exit(main(sys.argv[1:]))
