"""`catsdogs score` with the JPEG decoder of the GPU switched off: CPUs decode."""

import sys
from unittest import mock

from catsdogs import data
from catsdogs.cli import main

if __name__ == "__main__":
    with mock.patch.object(data, "gpus_decode_jpegs", return_value=False):
        sys.exit(main(sys.argv[1:]))
