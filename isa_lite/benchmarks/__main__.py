"""The old name of `python -m isa_lite benchmarks`."""

import sys

from isa_lite.commands import main

if __name__ == "__main__":
    main(["benchmarks", *sys.argv[1:]])
