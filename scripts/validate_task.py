"""`accelerate launch scripts/validate_task.py`, which is `res2net-zoo validate-task`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["validate-task", *sys.argv[1:]]))
