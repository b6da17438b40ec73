"""`python scripts/cam.py`, which is `res2net-zoo cam`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["cam", *sys.argv[1:]]))
