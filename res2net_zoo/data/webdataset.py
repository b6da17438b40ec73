"""WebDataset shards with one image column for all image formats.

`datasets` creates one column per extension, and only for the extensions of the first samples. This is a separate
module because `datasets` patches the functions of a builder's module to read over the network.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import datasets

from res2net_zoo.data.images import is_hidden, is_image
from res2net_zoo.utils.private_apis import WebDataset, base_plus_ext

# Extensions in order of preference, for samples with several images.
FIRST = ("image", "img", "jpg", "jpeg", "png", "webp")
EXTENSION = "__extension__"  # of the image, if a sample has one


def read_shards(files: dict[str, list[str]], members: list[str], split: str, streaming: bool) -> Any:
    """Return the rows of one split of shards.

    Args:
        files: Patterns for the shards of each split.
        members: Names of the files in all shards, if known.
        split: The split.
        streaming: Whether to return an iterable dataset.
    """
    features = _features(_field(name) for name in members if _is_visible(name)) if members else None
    # Name and hash are part of the cache's path.
    builder = ImageShards(data_files=files, features=features, dataset_name="image_shards", hash="1")
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _whole_number(content: bytes) -> int:
    text = content[:20].strip()
    if not re.fullmatch(rb"[+-]?\d{1,18}", text):  # more digits may not fit into 64 bits
        raise ValueError(f"the label {text.decode(errors='replace')} is not a whole number of at most 18 digits")
    return int(text)


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


class ImageShards(WebDataset):
    """Samples with the column `image`, and one column per other extension with integers or text, in lower case."""

    # Other files of a sample are ignored.
    DECODERS = {name: _whole_number for name, decoder in WebDataset.DECODERS.items() if decoder is int} | {"txt": _text}

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        visible = ((name, file) for name, file in tar_iterator if _is_visible(name))
        for sample in super()._get_pipeline_from_tar(tar_path, visible):
            row = {"image": None} | {name.lower(): value for name, value in sample.items() if not _holds_image(name)}
            if images := sorted(filter(_holds_image, sample), key=_rank):
                row |= {"image": sample[images[0]], EXTENSION: images[0]}
            yield row

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if not self.info.features:  # infer them from the first samples
            path = next(iter(dl_manager.download(self.config.data_files).values()))[0]
            rows = self._get_pipeline_from_tar(path, dl_manager.iter_archive(path))
            first = islice(rows, self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE)
            self.info.features = _features(field for row in first for field in row)
        return super()._split_generators(dl_manager)

    def _generate_examples(self, tar_paths: Any, tar_iterators: Any) -> Iterator[Any]:
        for key, example in super()._generate_examples(tar_paths, tar_iterators):
            if example["image"] is not None:
                example["image"]["path"] = f"{example['__key__']}.{example[EXTENSION]}"
            yield key, {name: example[name] for name in self.info.features}


def _features(fields: Iterable[str | None]) -> datasets.Features:
    """Return the columns for samples with the given fields: the image, integers and text."""
    columns = {}
    for field in sorted({field.lower() for field in fields if field and not _holds_image(field)}):
        if decoder := ImageShards.DECODERS.get(field.split(".")[-1]):
            columns[field] = datasets.Value("int64" if decoder is _whole_number else "string")
    names = dict.fromkeys(("__key__", "__url__"), datasets.Value("string"))
    return datasets.Features({"image": datasets.Image(), **columns, **names})


def _field(member: str) -> str | None:
    return base_plus_ext(member)[1]


def _is_visible(member: str) -> bool:
    return not any(is_hidden(part) for part in member.split("/") if part != ".")


def _holds_image(field: str) -> bool:
    return field.lower() in FIRST or is_image(f"x.{field}")


def _rank(field: str) -> tuple[bool, int]:
    name = field.lower()
    return "." in name, FIRST.index(name) if name in FIRST else len(FIRST)
