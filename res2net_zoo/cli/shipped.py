"""The recipes, the model and the data that come with the zoo, in a clone and in a wheel."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel they are inside the package, by `tool.hatch.build.targets.wheel.sources` in pyproject.toml.
CLONE = {"recipes": "scripts/recipes", "models": "hub/models", "datasets": "hub/datasets"}


def shipped(kind: str, name: str = "") -> Path:
    """Return the path of what comes with the zoo.

    Args:
        kind: `recipes`, `models` or `datasets`.
        name: A file or folder in there.
    """
    in_wheel = PACKAGE / "shipped"
    return (in_wheel / kind if in_wheel.is_dir() else PACKAGE.parent / CLONE[kind]) / name


def from_here(path: Path) -> str:
    """Return a path relative to the current folder where it is inside of it, else from the root."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def shipped_model() -> str:
    """Return the name by which `timm.create_model` loads the shipped model, from the current folder."""
    return f"local-dir:{from_here(shipped('models', 'res2net_tiny.digits'))}"


def shipped_data() -> str:
    """Return the path of the shipped images of digits, from the current folder."""
    return from_here(shipped("datasets", "digits"))


def as_in_clone(name: str) -> str:
    """Return a name in which what a wheel ships has the path that it has in a clone, which is shorter to read."""
    for kind, folder in CLONE.items():
        name = name.replace(str(PACKAGE / "shipped" / kind), folder)
    return name
