"""`python hub/convert.py`, which is `res2net-zoo convert`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
