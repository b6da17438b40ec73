"""The metadata of a card: YAML that others wrote, whose size is held against bounds before it is read.

A few bytes of YAML can stand for a list of any length by repeating an anchor, and can hold themselves.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from res2net_zoo.utils.files import read_text

LARGEST_CARD = 2**20  # bytes; the parser of YAML is slow
MOST_VALUES = 2**18  # of metadata, repeated ones counted
DEEPEST = 50  # lists and mappings within each other
LONGEST_NUMBER = 100  # characters; a number is read in the square of the time

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where PyYAML was built with it


def check_yaml(text: str) -> None:
    """Check how much a YAML text stands for, before it is made into values.

    Args:
        text: The text.

    Raises:
        ValueError: It exceeds a bound.
        yaml.YAMLError: It is not YAML.
    """
    values, known, opened = 0, dict[str, int](), list[tuple[str | None, int]]()
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise ValueError(f"it refers to {event.anchor[:80]}, which is missing or not complete there")
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
            raise ValueError(f"it has more than the limit of {MOST_VALUES:,} values of metadata, repeated ones counted")
        if len(opened) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def read_card(path: Path) -> ModelCard:
    """Read a model card.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, or is larger than a card may be.
        Exception: Its metadata exceeds a bound, or is not what huggingface_hub reads.
    """
    text = read_text(path, LARGEST_CARD)
    if block := REGEX_YAML_BLOCK.search(text):
        check_yaml(block[2])
    return ModelCard(text)
