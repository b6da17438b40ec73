"""Paths of the shipped recipes, model, data and page, in a clone or a wheel."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel they are inside the package, by `tool.hatch.build.targets.wheel.sources` in pyproject.toml.
CLONE = {"recipes": "scripts/recipes", "models": "hub/models", "datasets": "hub/datasets", "space": "hub/space"}


def shipped(kind: str, name: str = "") -> Path:
    """Return the path of a shipped file or folder.

    Args:
        kind: `recipes`, `models`, `datasets` or `space`.
        name: A file or folder of this kind.
    """
    in_wheel = PACKAGE / "shipped"
    return (in_wheel / kind if in_wheel.is_dir() else PACKAGE.parent / CLONE[kind]) / name


def from_here(path: Path) -> str:
    """Return a path, relative to the current folder if it is inside it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def shipped_model() -> str:
    """Return the name of the shipped model for `timm.create_model`."""
    return f"local-dir:{from_here(shipped('models', 'res2net_tiny.digits'))}"


def shipped_data() -> str:
    """Return the path of the shipped images of digits."""
    return from_here(shipped("datasets", "digits"))


def as_in_clone(name: str) -> str:
    """Return a name with paths in the wheel replaced by the shorter ones of a clone, for display."""
    for kind, folder in CLONE.items():
        name = name.replace(str(PACKAGE / "shipped" / kind), folder)
    return name
