"""Res2Net Zoo: every Res2Net behind `timm.create_model`. Importing the package registers them."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

# `python -m res2net_zoo` imports the package to find its `__main__`, which reads the command line before slow
# modules are imported.
if sys.argv[:1] != ["-m"] or ["-m", "res2net_zoo"] not in (sys.orig_argv[1:3], sys.orig_argv[2:4]):
    with warnings.catch_warnings():
        # timm has some of these names. Ours take their place, with the same weights and the same
        # output, so its warning that a name is overwritten is unnecessary.
        warnings.filterwarnings("ignore", message="Overwriting .* in registry with res2net_zoo")
        from res2net_zoo.models import biglittle, cifar, dla, res2net

    from res2net_zoo.models.cifar import cifar_res2next

if TYPE_CHECKING:
    from res2net_zoo.inference.optimization import optimize

__version__ = "0.1.1"

__all__ = ["__version__", "biglittle", "cifar", "cifar_res2next", "dla", "optimize", "res2net"]


def __getattr__(name: str) -> Any:
    # Only who asks for it pays for its imports.
    if name == "optimize":
        from res2net_zoo.inference.optimization import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
