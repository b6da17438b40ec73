"""`python scripts/export.py`, which is `res2net-zoo export`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
