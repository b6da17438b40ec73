"""Names of models: of timm's registry, of a folder, of a repository on the Hub; what looks like a path is a path."""

import os
from pathlib import Path

import timm
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import get_arch_name, parse_model_name

from res2net_zoo.utils.command_line import did_you_mean
from res2net_zoo.utils.console import similar_path
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import finish_replacing

SOURCES = ("local-dir", "hf-hub")


def parse_name(name: str) -> tuple[str | None, str]:
    """Split a model's name as timm does, and check that a folder or repository can be what it names.

    Args:
        name: What `timm.create_model` takes.

    Returns:
        Source (`local-dir`, `hf-hub`, or None for timm's registry), and the name there.

    Raises:
        InputError: Unknown source, missing folder, or not a repository's id; suggests what may have been meant.
    """
    if os.path.exists(name) and ":" not in name and not timm.is_model(get_arch_name(name)):
        raise InputError(_what_is_wrong(name))
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise InputError(_what_is_wrong(name)) from error
    if source == "local-dir":
        check_folder(identifier)
    elif source == "hf-hub" and not is_repository_id(identifier.partition("@")[0]):
        raise InputError(f"{identifier} is not a repository id ORG/NAME; a folder is local-dir:DIR")
    return source, identifier


def check_folder(name: str) -> Path:
    """Return a folder's path.

    Raises:
        InputError: It is missing or a file; suggests what may have been meant.
    """
    if not os.path.exists(name):
        finish_replacing(Path(name))
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; name a model folder")
    if name.startswith("~"):  # the shell expands it at the beginning of a word only
        raise InputError(f"there is no model folder {name}; write it in full: {os.path.expanduser(name)}")
    raise InputError(f"there is no model folder {name}{similar_path(Path(name))}")


def is_repository_id(name: str) -> bool:
    """Return whether a repository on the Hub can have a name, as ORG/NAME or, of old, NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_path(name: str) -> bool:
    """Return whether a name looks like a path rather than a repository's id ORG/NAME.

    What begins as a path does, what has several slashes, and what leads into a folder that exists.
    """
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.endswith(("/", "\\"))
        or not is_repository_id(name)
        or ("/" in name and os.path.isdir(os.path.dirname(name)))
    )


def _what_is_wrong(name: str) -> str:
    if os.path.isdir(name):
        return f"{name} is a folder; name it as local-dir:{name}"
    if os.path.exists(name):
        return f"{name} is a file; name a model folder as local-dir:DIR (hub/convert.py makes one of a release's file)"
    prefix, colon, _ = name.partition(":")
    if prefix in SOURCES:
        return f"{name} lacks what follows the colon: a folder after local-dir:, ORG/NAME after hf-hub:"
    if colon and len(prefix) > 1 and prefix.replace("-", "").replace("_", "").isalnum():  # one letter is a drive
        hint = did_you_mean(prefix, SOURCES, f"there are {' and '.join(SOURCES)}")
        return f"{name}: unknown source {prefix}; {hint}"
    hint = similar_path(Path(name)).replace("did you mean ", "did you mean local-dir:")
    if not hint:
        hint = "; name a folder as local-dir:DIR" + ("" if is_path(name) else f", or a repository as hf-hub:{name}")
    return f"there is no model folder {name}{hint}"
