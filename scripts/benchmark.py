"""`python scripts/benchmark.py`, which is `res2net-zoo benchmark`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
