"""`python scripts/predict_task.py`, which is `res2net-zoo predict-task`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main(["predict-task", *sys.argv[1:]]))
