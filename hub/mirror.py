"""`python hub/mirror.py`, which is `res2net-zoo mirror`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["mirror", *sys.argv[1:]]))
