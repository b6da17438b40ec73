"""Mapping a dataset's labels to a model's classes, including ImageNet and its variants.

Models with 1000 classes are assumed to have ImageNet-1k's, sorted by WordNet id. The variants use
these ids as folder names (ImageNet-A, -R, -Sketch), class numbers (ImageNet-V2) or the original file
names (ImageNet-ReaL). ImageNet-A and -R have 200 of the classes, and published accuracies are for
predictions among these 200.
"""

import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from timm.data import ImageNetInfo, RealLabelsImagenet

from res2net_zoo.utils.errors import InputError

# Hub ids of known benchmarks.
HUB_BENCHMARKS = {"ILSVRC/imagenet-1k": "imagenet-1k", "timm/imagenet-1k-wds": "imagenet-1k"}
SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
NUM_VALIDATION_IMAGES = 50_000


def class_names(model: Any) -> list[str]:
    """Return the class names of a timm model: from its config, ImageNet's for 1000 classes, otherwise numbers."""
    if names := model.pretrained_cfg.get("label_names"):
        return list(names)
    if model.num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(1000)]
    return [str(i) for i in range(model.num_classes)]


@cache
def imagenet_synsets() -> list[str]:
    """Return the 1000 WordNet ids of ImageNet-1k in the order of the classes."""
    return ImageNetInfo("imagenet-1k").label_names()


@cache
def subset_synsets(benchmark: str) -> list[str]:
    """Return the sorted WordNet ids of `imagenet-a` or `imagenet-r`, from lists in timm."""
    content = pkgutil.get_data("timm.data", f"_info/{SUBSETS[benchmark]}")
    assert content is not None
    return content.decode().split()


@cache
def real_labels() -> dict[str, list[int]]:
    """Return the ReaL labels (Beyer et al., 2020) of each ImageNet validation image, by file name."""
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, NUM_VALIDATION_IMAGES + 1)]
    return RealLabelsImagenet(names).real_labels


def recognize(name: str, split: str, class_names: Sequence[str] | None, num_rows: int | None) -> str | None:
    """Recognize an ImageNet benchmark by the properties of a dataset.

    Args:
        name: The dataset's Hub id or name.
        split: The split.
        class_names: The class names, if any.
        num_rows: The number of images, if known.

    Returns:
        `imagenet-1k`, `-v2`, `-a`, `-r` or `-sketch`, or None if it is not recognized.
    """
    if name in HUB_BENCHMARKS:
        return HUB_BENCHMARKS[name] if split == "validation" else None
    names = set(class_names or ())
    for benchmark in SUBSETS:
        if names == set(subset_synsets(benchmark)):
            return benchmark
    if len(names) == 1000:
        if num_rows == 10_000 and all(n.isdecimal() for n in names):
            return "imagenet-v2"
        if names == set(imagenet_synsets()):
            return {NUM_VALIDATION_IMAGES: "imagenet-1k", 50_889: "imagenet-sketch"}.get(num_rows or 0)
    return None


@dataclass
class Classes:
    """A mapping from a dataset's labels to a model's classes.

    Attributes:
        num_classes: Number of the model's classes.
        of_label: Class of each label; None if label i is class i.
        subset: Classes to predict among; None for all.
        real: Whether the correct classes come from ImageNet-ReaL, by file name.
        warning: A warning if the mapping is uncertain.
    """

    num_classes: int
    of_label: list[int] | None = None
    subset: list[int] | None = None
    real: bool = False
    warning: str | None = None
    position: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.position = {c: i for i, c in enumerate(self.subset)} if self.subset else {}

    def targets(self, label: int | None, path: str | None) -> list[int]:
        """Return the correct classes of an image; empty if it is excluded from the evaluation.

        Args:
            label: The dataset's label.
            path: The image's path, for ImageNet-ReaL.

        Returns:
            Indices of the model's classes, or positions in `subset` if given.

        Raises:
            InputError: The label is missing or out of range, or the path is not that of an ImageNet image.
        """
        if self.real:
            match = re.search(r"ILSVRC2012_val_\d{8}", path or "")
            if match is None or (name := f"{match[0]}.JPEG") not in real_labels():
                raise InputError("ImageNet-ReaL requires file names such as ILSVRC2012_val_00000001.JPEG")
            return real_labels()[name]
        if label is None:
            raise InputError("its label is missing")
        num_labels = self.num_classes if self.of_label is None else len(self.of_label)
        if not 0 <= label < num_labels:
            raise InputError(f"its label {label} is out of range; labels go from 0 to {num_labels - 1}")
        index = label if self.of_label is None else self.of_label[label]
        return [self.position[index] if self.subset else index]


def match_classes(
    class_names: Sequence[str] | None,
    num_classes: int,
    model_labels: Sequence[str] | None = None,
    benchmark: str | None = None,
) -> Classes:
    """Map the labels of a dataset to the classes of a model.

    The first of these that applies is used: class names of the model; WordNet ids; integers, in
    numeric order; otherwise label i is class i.

    Args:
        class_names: Name of each label, if known.
        num_classes: Number of the model's classes.
        model_labels: The model's class names, if its config has them.
        benchmark: The ImageNet benchmark, if the data is one.

    Returns:
        The mapping.

    Raises:
        InputError: The model has fewer classes than the data, or not those of the benchmark.
    """
    if benchmark is not None and num_classes != 1000:
        raise InputError(f"{benchmark} needs a model with ImageNet's 1000 classes, this one has {num_classes}")
    if benchmark == "imagenet-real":
        return Classes(num_classes, real=True)
    if benchmark in SUBSETS:
        synsets = subset_synsets(benchmark)
        subset = [imagenet_synsets().index(synset) for synset in synsets]
        if class_names is not None and set(class_names) <= set(synsets):
            return Classes(num_classes, [imagenet_synsets().index(name) for name in class_names], subset)
        if class_names is not None and (len(class_names) != len(synsets) or set(class_names) & set(imagenet_synsets())):
            raise InputError(f"{benchmark} has {len(synsets)} classes, named by WordNet id; this data has others")
        # Without ids, labels are numbers in the order of the ids, by the convention of these datasets.
        return Classes(num_classes, [subset[i] for i in numeric_order(class_names or range(len(subset)))], subset)
    if class_names is None:
        return Classes(num_classes)
    if len(class_names) > num_classes:
        raise InputError(
            f"the data has {len(class_names)} classes and the model only {num_classes}; choose another model"
        )
    for known in (model_labels, imagenet_synsets() if num_classes == 1000 else None):
        if known and set(class_names) <= set(known):
            index = {name: i for i, name in enumerate(known)}
            return Classes(num_classes, [index[name] for name in class_names])
    if numbered := _match_numbers(class_names, num_classes):
        return numbered
    warning: str | None = None
    if len(class_names) < num_classes or model_labels:
        warning = (
            f"the data's {len(class_names)} class names ({', '.join(class_names[:3])}, ...) are not among those of the "
            f"model's {num_classes} classes; label i is used as class i"
        )
    return Classes(num_classes, warning=warning)


def _match_numbers(class_names: Sequence[str], num_classes: int) -> Classes | None:
    """Map labels named by integers to a model's classes; return None for other names and larger numbers."""
    if not all(name.isdecimal() for name in class_names):
        return None
    if len(class_names) == num_classes:
        return Classes(num_classes, numeric_order(class_names))
    numbers = [int(name) for name in class_names]
    if max(numbers) >= num_classes:
        return None
    warning = f"the data has {len(numbers)} numbered classes, the model {num_classes}; number i is used as class i"
    return Classes(num_classes, numbers, warning=warning)


def numeric_order(names: Iterable[str | int]) -> list[int]:
    """Return the position of each name in numeric order; the given order if a name is not an integer."""
    texts = [str(name) for name in names]
    if not all(text.isdecimal() for text in texts):
        return list(range(len(texts)))
    place = {text: i for i, text in enumerate(sorted(texts, key=int))}
    return [place[text] for text in texts]
