"""`python -m res2net_zoo COMMAND`, which is `res2net-zoo COMMAND`; for `accelerate launch -m res2net_zoo COMMAND`."""

import sys

from res2net_zoo_cli import main

if __name__ == "__main__":
    sys.exit(main())
