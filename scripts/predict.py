"""`accelerate launch scripts/predict.py`, which is `res2net-zoo predict`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
