"""`python hub/publish.py`, which is `res2net-zoo publish`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
