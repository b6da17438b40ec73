"""Reading the YAML metadata of model cards with limits on its size and depth.

With anchors, a few bytes of YAML can expand to a list of any length, or contain themselves.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from res2net_zoo.utils.files import read_text

LARGEST_CARD = 2**20  # bytes; parsing YAML is slow
MOST_VALUES = 2**18  # values, including those repeated by aliases
DEEPEST = 50  # nested lists and mappings
LONGEST_NUMBER = 100  # characters; parsing a number takes quadratic time

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser, if PyYAML has it


def check_yaml(text: str) -> None:
    """Check the expanded size of a YAML document, before it is loaded.

    Args:
        text: The document.

    Raises:
        ValueError: The document exceeds a limit.
        yaml.YAMLError: It is not valid YAML.
    """
    values, known, opened = 0, dict[str, int](), list[tuple[str | None, int]]()
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise ValueError(f"it refers to the anchor {event.anchor[:80]}, which is missing or incomplete there")
            values += known[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            known |= {anchor: values - before} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            known |= {event.anchor: 1} if event.anchor else {}
            if event.implicit[0] and re.fullmatch(rf"[-+\d_:.]{{{LONGEST_NUMBER},}}", event.value):
                raise ValueError(f"it has a number of more than {LONGEST_NUMBER} characters")
        if values > MOST_VALUES:
            raise ValueError(f"it has more values than the limit of {MOST_VALUES:,}, including repeated ones")
        if len(opened) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def read_card(path: Path) -> ModelCard:
    """Read a model card.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, or is too large.
        Exception: The metadata exceeds a limit, or huggingface_hub cannot read it.
    """
    text = read_text(path, LARGEST_CARD)
    if block := REGEX_YAML_BLOCK.search(text):
        check_yaml(block[2])
    return ModelCard(text)
