"""The page of `res2net-zoo space`, as a Space on the Hub."""

import os
import sys

from res2net_zoo.cli.space import main

if __name__ == "__main__":
    # Spaces set this variable, because a proxy outside of the container reads the page.
    sys.exit(main(["--host", os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")]))
