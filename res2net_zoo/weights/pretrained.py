"""Create a model by name, with its weights."""

from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from timm.models import get_arch_name
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.utils import hub_client
from res2net_zoo.utils.command_line import did_you_mean
from res2net_zoo.utils.console import nearest
from res2net_zoo.utils.errors import InputError, clipped, one_line
from res2net_zoo.weights import model_config, torch_file
from res2net_zoo.weights.convert import explain
from res2net_zoo.weights.model_names import parse_name


def create_model(name: str, pretrained: bool = True, **kwargs) -> nn.Module:
    """Call `timm.create_model`, and raise `InputError` with a one-line message for all errors.

    Args:
        name: A name as for `timm.create_model`: `arch`, `arch.tag`, `local-dir:DIR` or
            `hf-hub:ORG/NAME`.
        pretrained: Whether to load the weights.
        **kwargs: As for `timm.create_model`.

    Returns:
        The model, in training mode as timm returns it.

    Raises:
        InputError: The model or its weights do not exist, the weights do not fit the model, or
            the Hub is not reachable.
    """
    source, identifier = parse_name(name)
    if source is None:
        _check_registered(name, pretrained)
    try:
        pinned = name
        if source == "local-dir":
            _check_folder(name, Path(identifier), pretrained)
        elif source == "hf-hub":
            pinned = _check_repository(name, identifier, pretrained, kwargs.get("cache_dir"))
        with torch_file.checking_timm():  # for architectures that the zoo's builder does not build
            model: Any = timm.create_model(pinned, pretrained=pretrained, **kwargs)
        if source == "hf-hub":
            model.pretrained_cfg["hf_hub_id"] = identifier  # as the caller names it
        return model
    except InputError:
        raise
    except LocalEntryNotFoundError as error:
        where = identifier if source else timm.get_pretrained_cfg_value(name, "hf_hub_id")
        command = f"hf download {where}".replace("@", " --revision ")
        cause = hub_client.cause_of(error)
        raise InputError(
            f"the Hub is not reachable{f' ({cause})' if cause else ''} and {where} is not in the cache; on a machine "
            f"with a network, `{command}` downloads it"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {identifier} on the Hub, or it is private and you are not logged in"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(f"cannot read {name} from the Hub: {one_line(error)}") from error
    except SafetensorError as error:
        raise InputError(
            f"the weights of {name} are not a complete safetensors file ({error}); replace them"
        ) from error
    except Exception as error:
        if source != "local-dir" and isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"cannot store {name} in the cache {kwargs.get('cache_dir') or constants.HF_HUB_CACHE}: "
                f"{error.strerror or error}; free some space there, or set HF_HOME to another folder"
            ) from error
        # timm and torch raise various types for an invalid config, unexpected tensors or a missing file.
        reason = (isinstance(error, OSError | RuntimeError | ValueError) and explain(error)) or repr(error)
        raise InputError(f"cannot load {name}: {clipped(reason, 500)}") from error


def _check_registered(name: str, pretrained: bool) -> None:
    architecture = get_arch_name(name)
    if not timm.is_model(architecture):
        everything = catalog.load()
        known = [*everything.architectures, *everything.checkpoints, *timm.list_models(), *timm.list_pretrained()]
        raise InputError(f"there is no model {name}; {nearest(name, known)}")
    weights = timm.list_pretrained(f"{architecture}.*")
    if "." in name and name not in timm.list_models(f"{architecture}*", include_tags=True):
        hint = did_you_mean(name, weights, f"there are {', '.join(weights)}" if weights else "it has none")
        raise InputError(f"{architecture} has no weights {name}; {hint}")
    if pretrained and not weights and not catalog.load().checkpoint(name):
        raise InputError(f"{architecture} has no published weights; name a folder with weights as local-dir:DIR")


def _check_folder(name: str, folder: Path, pretrained: bool) -> None:
    """Check a model folder before timm builds its model; the weights may be missing if they are not loaded."""
    try:
        if pretrained or (folder / WEIGHTS).exists():
            model_config.check_folder(folder)
        else:
            model_config.build_on_meta(model_config.read(folder / model_config.NAME))
    except InputError as error:
        raise InputError(f"cannot load {name}: {error}") from error


def _check_repository(name: str, identifier: str, pretrained: bool, cache_dir: str | Path | None) -> str:
    """Check a repository's config and weights before timm builds its model.

    Returns:
        The model's name with the commit that was checked, which timm loads from the cache without another request.
    """
    repository, _, revision = identifier.partition("@")
    path = Path(hf_hub_download(repository, model_config.NAME, revision=revision or None, cache_dir=cache_dir))
    commit = path.parent.name
    try:
        config = model_config.read(path)
        if pretrained:
            model_config.check_weights(config, _fetch_weights(repository, commit, cache_dir))
        else:
            model_config.build_on_meta(config)
    except InputError as error:
        raise InputError(f"cannot load {name}: {error}") from error
    return f"hf-hub:{repository}@{commit}"


def _fetch_weights(repository: str, commit: str, cache_dir: str | Path | None) -> Path:
    """Download a repository's weights as timm does, safetensors if available, and verify their hash."""
    pickled = "pytorch_model.bin"
    try:
        path, filename = hf_hub_download(repository, WEIGHTS, revision=commit, cache_dir=cache_dir), WEIGHTS
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        path, filename = hf_hub_download(repository, pickled, revision=commit, cache_dir=cache_dir), pickled
    hub_client.check_cached(f"{repository}@{commit}", filename, cache_dir)
    return Path(path)
