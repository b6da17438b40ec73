"""`accelerate launch scripts/train_task.py`, which is `res2net-zoo train-task`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["train-task", *sys.argv[1:]]))
