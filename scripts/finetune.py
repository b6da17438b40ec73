"""`accelerate launch scripts/finetune.py`, which is `res2net-zoo finetune`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
