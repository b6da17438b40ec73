"""`accelerate launch scripts/validate.py`, which is `res2net-zoo validate`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
