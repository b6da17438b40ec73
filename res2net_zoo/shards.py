"""WebDataset shards read with one column of images, whatever their formats.

`datasets` makes a column of each extension, and only of those that the first samples have. In a module of
its own, whose functions `datasets` exchanges for others that read over the network.
"""

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from res2net_zoo.images import is_hidden, is_image

# Which of a sample's images is the one to classify, where there are several.
FIRST = ("image", "img", "jpg", "jpeg", "png", "webp")
EXTENSION = "__extension__"  # of the image, where a sample has one


def read_shards(files: dict[str, list[str]], split: str, streaming: bool) -> Any:
    """Return the rows of one split of shards.

    Args:
        files: Patterns of each split's shards.
        split: Which split.
        streaming: Whether to read the samples as they come.
    """
    # The name and the hash take part in the name of what is cached.
    builder = ImageShards(data_files=files, dataset_name="image_shards", hash="1")
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


class ImageShards(WebDataset):
    """Samples with the columns `image` and one for each other lower-case extension of whole numbers or text."""

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        visible = ((name, file) for name, file in tar_iterator if _is_visible(name))
        for sample in super()._get_pipeline_from_tar(tar_path, visible):
            row = {"image": None} | {name.lower(): value for name, value in sample.items() if not _holds_image(name)}
            if images := sorted(filter(_holds_image, sample), key=_rank):
                row |= {"image": sample[images[0]], EXTENSION: images[0]}
            yield row

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        columns: dict[str, datasets.Value] = {}
        for paths in dl_manager.download(self.config.data_files).values():
            for path in paths if all(map(os.path.isfile, paths)) else paths[:1]:
                columns |= _columns_in(path, dl_manager)
        features = {"image": datasets.Image(), **columns, "__key__": datasets.Value("string")}
        self.info.features = datasets.Features({**features, "__url__": datasets.Value("string")})
        return super()._split_generators(dl_manager)

    def _generate_examples(self, tar_paths: Any, tar_iterators: Any) -> Iterator[Any]:
        for key, example in super()._generate_examples(tar_paths, tar_iterators):
            if example["image"] is not None:
                example["image"]["path"] = f"{example['__key__']}.{example[EXTENSION]}"
            yield key, {name: example[name] for name in self.info.features}


def _columns_in(path: str, dl_manager: Any) -> dict[str, datasets.Value]:
    """Return the columns besides the image: of a local file all there are, of another those of its first samples."""
    if os.path.isfile(path):
        with tarfile.open(path, "r:") as tar:  # reads the headers only
            names = [base_plus_ext(member.name)[1] for member in tar if member.isfile() and _is_visible(member.name)]
    else:
        rows = ImageShards._get_pipeline_from_tar(path, dl_manager.iter_archive(path))
        names = [name for row in islice(rows, ImageShards.NUM_EXAMPLES_FOR_FEATURES_INFERENCE) for name in row]
    types = {"int": datasets.Value("int64"), "text_loads": datasets.Value("string")}
    found: dict[str, datasets.Value] = {}
    for name in sorted({name.lower() for name in names if name and not _holds_image(name)}):
        decoder = ImageShards.DECODERS.get(name.split(".")[-1])
        if kind := types.get(getattr(decoder, "__name__", "")):
            found[name] = kind
    return found


def _is_visible(member: str) -> bool:
    return not any(is_hidden(part) for part in member.split("/") if part != ".")


def _holds_image(field: str) -> bool:
    return field.lower() in FIRST or is_image(f"x.{field}")


def _rank(field: str) -> tuple[bool, int]:
    name = field.lower()
    return "." in name, FIRST.index(name) if name in FIRST else len(FIRST)
