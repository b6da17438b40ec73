"""Model names: from timm's registry, for a folder (`local-dir:`) or for a repository on the Hub (`hf-hub:`)."""

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
    """Split a model's name as timm does, and check that the folder exists or the repository id is valid.

    Args:
        name: A name as for `timm.create_model`.

    Returns:
        Source (`local-dir`, `hf-hub`, or None for timm's registry), and the name without the source.

    Raises:
        InputError: The source is unknown, the folder missing, or the repository id invalid; suggests corrections.
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
    """Return the path of a model folder.

    Raises:
        InputError: The folder is missing or a file; suggests corrections.
    """
    if not os.path.exists(name):
        finish_replacing(Path(name))
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; name a model folder")
    if name.startswith("~"):  # shells expand it only at the beginning of a word
        raise InputError(f"there is no model folder {name}; write it in full: {os.path.expanduser(name)}")
    raise InputError(f"there is no model folder {name}{similar_path(Path(name))}")


def is_repository_id(name: str) -> bool:
    """Return whether a name is a valid repository id, ORG/NAME or the older form NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_path(name: str) -> bool:
    """Return whether a name looks like a path rather than a repository id ORG/NAME.

    It does if it begins or ends like a path, has several slashes, or its parent folder exists.
    """
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.endswith(("/", "\\"))
        or not is_repository_id(name)
        or ("/" in name and os.path.isdir(os.path.dirname(name)))
    )


def _what_is_wrong(name: str) -> str:
    if os.path.isdir(name):
        return f"{name} is a folder; use local-dir:{name}"
    if os.path.exists(name):
        return f"{name} is a file; name a model folder as local-dir:DIR (a released file must be converted to one)"
    prefix, colon, _ = name.partition(":")
    if prefix in SOURCES:
        return f"{name}: missing name after the colon; use local-dir:DIR or hf-hub:ORG/NAME"
    if colon and len(prefix) > 1 and prefix.replace("-", "").replace("_", "").isalnum():  # one letter is a drive
        hint = did_you_mean(prefix, SOURCES, f"choose {' or '.join(SOURCES)}")
        return f"{name}: unknown source {prefix}; {hint}"
    hint = similar_path(Path(name)).replace("did you mean ", "did you mean local-dir:")
    if not hint:
        hint = "; name a folder as local-dir:DIR" + ("" if is_path(name) else f", or a repository as hf-hub:{name}")
    return f"there is no model folder {name}{hint}"
