"""Res2Net Zoo: every Res2Net behind `timm.create_model`. Importing the package registers them."""

import warnings

with warnings.catch_warnings():
    # timm has some of these names. Ours take their place, with the same weights and the same
    # output, so its warning that a name is overwritten has nothing to tell.
    warnings.filterwarnings("ignore", message="Overwriting .* in registry with res2net_zoo")
    from res2net_zoo import biglittle, cifar, dla, res2net

from res2net_zoo.cifar import cifar_res2next

__version__ = "0.1.0"

__all__ = ["__version__", "biglittle", "cifar", "cifar_res2next", "dla", "res2net"]
