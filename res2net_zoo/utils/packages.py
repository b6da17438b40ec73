"""Optional packages, which the extras of this package install."""

import importlib.util

from res2net_zoo.utils.errors import InputError

# Modules with other names than their packages.
MODULES = {"grad-cam": "pytorch_grad_cam", "pyopenssl": "OpenSSL", "pysodmetrics": "py_sod_metrics"}


def require(purpose: str, extra: str, *packages: str) -> None:
    """Check that packages are installed.

    Args:
        purpose: What needs them, such as `exporting needs`.
        extra: The extra that installs them.
        *packages: Their names on PyPI.

    Raises:
        InputError: One is missing.
    """
    modules = {name: MODULES.get(name, name.replace("-", "_")) for name in packages}
    missing = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"{purpose} {' and '.join(missing)}; pip install 'res2net-zoo[{extra}]'")
