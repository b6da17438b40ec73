"""From a model's name to the model, with its weights."""

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
    """Call `timm.create_model`, turning everything that can be wrong with a name into one line.

    Args:
        name: What `timm.create_model` takes: `arch`, `arch.tag`, `local-dir:DIR` or
            `hf-hub:ORG/NAME`.
        pretrained: Whether to load the weights.
        **kwargs: As for `timm.create_model`.

    Returns:
        The model, in training mode as timm returns it.

    Raises:
        InputError: No such model, no such weights, a file that is no weight of this model, or
            the Hub is out of reach.
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
            f"the Hub is out of reach{f' ({cause})' if cause else ''} and {where} is not in its cache; where there is "
            f"a network, `{command}` fetches it"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {identifier} on the Hub, or it is private and you are not logged in"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(f"cannot read {name} from the Hub: {one_line(error)}") from error
    except SafetensorError as error:
        raise InputError(
            f"the weights of {name} are no whole safetensors file ({error}); fetch or make them again"
        ) from error
    except Exception as error:
        if source != "local-dir" and isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"cannot keep {name} in the cache {kwargs.get('cache_dir') or constants.HF_HUB_CACHE}: "
                f"{error.strerror or error}; make room there, or set HF_HOME to another folder"
            ) from error
        # A wrong config, foreign tensors or a missing file: timm and torch have no one type for it.
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
        raise InputError(f"{architecture} has no published weights; train some, or name a folder as local-dir:DIR")


def _check_folder(name: str, folder: Path, pretrained: bool) -> None:
    """Check a model folder before timm builds anything of it; without weights only if none are to be loaded."""
    try:
        if pretrained or (folder / WEIGHTS).exists():
            model_config.check_folder(folder)
        else:
            model_config.build_on_meta(model_config.read(folder / model_config.NAME))
    except InputError as error:
        raise InputError(f"cannot load {name}: {error}") from error


def _check_repository(name: str, identifier: str, pretrained: bool, cache_dir: str | Path | None) -> str:
    """Check a repository's config and weights before timm builds anything of it.

    Returns:
        Its name at the commit that was checked, of which timm finds all in the cache without asking the Hub again.
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
    """Fetch a repository's weights as timm does: safetensors where there are some, and hold them against their hash."""
    pickled = "pytorch_model.bin"
    try:
        path, filename = hf_hub_download(repository, WEIGHTS, revision=commit, cache_dir=cache_dir), WEIGHTS
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        path, filename = hf_hub_download(repository, pickled, revision=commit, cache_dir=cache_dir), pickled
    hub_client.check_cached(f"{repository}@{commit}", filename, cache_dir)
    return Path(path)
