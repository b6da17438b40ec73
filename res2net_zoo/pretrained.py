"""From a model's name to the model, with its weights, and to the accuracies published for it."""

import logging
from pathlib import Path

import timm
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.models import get_arch_name, parse_model_name
from torch import nn

from res2net_zoo import catalog
from res2net_zoo.catalog import Accuracy
from res2net_zoo.program import InputError, nearest

_logger = logging.getLogger(__name__)


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
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if source is None:
        _check_registered(name, pretrained)
    elif source == "local-dir" and not Path(identifier).is_dir():
        raise InputError(f"there is no model folder {identifier}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except LocalEntryNotFoundError as error:
        where = identifier if source else timm.get_pretrained_cfg_value(name, "hf_hub_id")
        raise InputError(
            f"the Hub is out of reach and {where} is not in its cache; where there is a network, "
            f"`hf download {where}` fetches it"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {identifier} on the Hub, or it is private and you are not logged in"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(f"cannot read {name} from the Hub: {error}") from error
    except SafetensorError as error:
        raise InputError(
            f"the weights of {name} are no whole safetensors file ({error}); fetch or make them again"
        ) from error
    except Exception as error:
        # A wrong config, foreign tensors or a missing file: timm and torch have no one type for it.
        reason = str(error).strip() or type(error).__name__
        raise InputError(f"cannot load {name}: {reason[:500]}{' ...' if len(reason) > 500 else ''}") from error


def _check_registered(name: str, pretrained: bool) -> None:
    architecture = get_arch_name(name)
    if not timm.is_model(architecture):
        raise InputError(f"there is no model {name}; {nearest(name, timm.list_models() + timm.list_pretrained())}")
    weights = timm.list_pretrained(f"{architecture}.*")
    if "." in name and name not in timm.list_models(f"{architecture}*", include_tags=True):
        raise InputError(f"{architecture} has no weights {name}; there are {', '.join(weights) or 'none'}")
    if pretrained and not weights:
        raise InputError(f"{architecture} has no published weights; train some, or name a folder as local-dir:DIR")


def published_accuracies(name: str) -> list[Accuracy]:
    """Return what has been published for a model.

    Args:
        name: As for `create_model`. For a model of the catalogue the catalogue answers, for a
            folder or a repository on the Hub the evaluation results of its model card.

    Returns:
        The accuracies, those to compare with first; empty where nothing is published.
    """
    source, identifier = parse_model_name(name)
    if source is None:
        checkpoint = catalog.load().checkpoint(name)
        return list(checkpoint.accuracies) if checkpoint else []
    try:
        card = ModelCard.load(Path(identifier) / "README.md" if source == "local-dir" else identifier.split("@")[0])
    except (OSError, ValueError, HfHubHTTPError):
        return []  # a model without a card has published nothing
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for result in card.data.eval_results or []:
        if result.metric_type in ("accuracy", "top-5-accuracy"):
            values = figures.setdefault((result.dataset_type, result.dataset_split or ""), {})
            values["top1" if result.metric_type == "accuracy" else "top5"] = float(result.metric_value)
    return [
        Accuracy(
            dataset=dataset, split=split, top1=values["top1"], top5=values["top5"], source=f"model card of {identifier}"
        )
        for (dataset, split), values in figures.items()
        if len(values) == 2
    ]
