"""`python hub/verify.py`, which is `res2net-zoo verify`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
