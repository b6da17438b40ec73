"""Mapping of dataset labels to model classes, including ImageNet variants."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from res2net_zoo.data.labels import imagenet_synsets, match_classes, real_labels, recognize, subset_synsets
from res2net_zoo.utils.errors import InputError


def test_timm_class_lists():
    synsets = imagenet_synsets()
    assert len(synsets) == 1000 and synsets == sorted(synsets) and synsets[0] == "n01440764"
    for benchmark in ("imagenet-a", "imagenet-r"):
        subset = subset_synsets(benchmark)
        assert len(subset) == 200 and subset == sorted(subset) and set(subset) < set(synsets)
    assert len(real_labels()) == 50_000


@given(st.permutations(range(30)), st.integers(1, 30))
@settings(deadline=None)
def test_wordnet_ids_map_to_imagenet_classes(order, n):
    names = [imagenet_synsets()[30 * i] for i in order[:n]]
    classes = match_classes(names, 1000)
    assert [classes.targets(label, None) for label in range(n)] == [[30 * i] for i in order[:n]]
    assert classes.warning is None and classes.subset is None


def test_integer_names_are_in_numeric_order():
    names = sorted(str(i) for i in range(1000))  # 0, 1, 10, 100, ...: the order of class folders
    classes = match_classes(names, 1000, benchmark="imagenet-v2")
    assert all(classes.targets(label, None) == [int(name)] for label, name in enumerate(names))
    one_based = match_classes(["1", "10", "2"], 3)
    assert [one_based.targets(label, None) for label in range(3)] == [[0], [2], [1]]
    some = match_classes(["10", "5", "700"], 1000)
    assert [some.targets(label, None) for label in range(3)] == [[10], [5], [700]]
    assert "number i is used as class i" in some.warning


def test_label_names_of_the_model_take_precedence():
    classes = match_classes(["2", "0"], 3, model_labels=["0", "1", "2"])
    assert [classes.targets(label, None) for label in (0, 1)] == [[2], [0]]
    cats = match_classes(["cat", "dog"], 3, model_labels=["dog", "eel", "cat"])
    assert [cats.targets(label, None) for label in (0, 1)] == [[2], [0]]


def test_unknown_names_are_mapped_in_order_with_a_warning():
    assert match_classes(["cat", "dog"], 2).warning is None
    assert "label i is used as class i" in match_classes(["cat", "dog"], 2, ["cat", "eel"]).warning
    classes = match_classes(["cat", "dog"], 5)
    assert classes.targets(1, None) == [1] and "label i is used as class i" in classes.warning


@pytest.mark.parametrize("benchmark", ["imagenet-a", "imagenet-r"])
def test_subsets_predict_among_their_classes(benchmark):
    names = subset_synsets(benchmark)
    for classes in (
        match_classes(names, 1000, benchmark=benchmark),
        match_classes([f"label {i}" for i in range(200)], 1000, benchmark=benchmark),
        match_classes(None, 1000, benchmark=benchmark),
    ):
        assert [imagenet_synsets()[i] for i in classes.subset] == names
        assert [classes.targets(label, None) for label in range(200)] == [[i] for i in range(200)]
    # Folders 0 to 199 are sorted as text: 0, 1, 10, 100, ...
    numbered = match_classes(sorted(str(i) for i in range(200)), 1000, benchmark=benchmark)
    assert [numbered.targets(label, None) for label in range(4)] == [[0], [1], [10], [100]]
    with pytest.raises(InputError, match="has 200 classes, named by WordNet id"):
        match_classes([*names[1:], "n01440764"][50:], 1000, benchmark=benchmark)
    with pytest.raises(InputError, match="has 200 classes, named by WordNet id"):  # the same number of other classes
        match_classes([*names[1:], next(s for s in imagenet_synsets() if s not in names)], 1000, benchmark=benchmark)
    reversed_names = match_classes(names[::-1], 1000, benchmark=benchmark)
    assert reversed_names.targets(0, None) == [199]


def test_real_labels_are_found_by_file_name():
    classes = match_classes(None, 1000, benchmark="imagenet-real")
    # Names as on the Hub, with the WordNet id after the number; the label is not used.
    assert (
        classes.targets(-1, "ILSVRC2012_val_00000001_n01751748.JPEG") == real_labels()["ILSVRC2012_val_00000001.JPEG"]
    )
    assert [] in [classes.targets(None, name) for name in list(real_labels())[:100]]
    for path in (None, "cat.jpg", "ILSVRC2012_val_00050001.JPEG"):
        with pytest.raises(InputError, match="file names"):
            classes.targets(0, path)


def test_incompatible_classes_are_refused():
    with pytest.raises(InputError, match="3 classes and the model only 2"):
        match_classes(["a", "b", "c"], 2)
    with pytest.raises(InputError, match="1000 classes"):
        match_classes(None, 10, benchmark="imagenet-a")
    classes = match_classes(None, 10)
    for label in (-1, 10):
        with pytest.raises(InputError, match="from 0 to 9"):
            classes.targets(label, None)
    with pytest.raises(InputError, match="its label is missing"):
        classes.targets(None, None)


def test_benchmarks_are_recognized():
    synsets = imagenet_synsets()
    numbers = [str(i) for i in range(1000)]
    assert recognize("ILSVRC/imagenet-1k", "validation", None, None) == "imagenet-1k"
    assert recognize("ILSVRC/imagenet-1k", "train", None, None) is None
    assert recognize("val", "validation", synsets, 50_000) == "imagenet-1k"
    assert recognize("sketch", "train", synsets, 50_889) == "imagenet-sketch"
    assert recognize("train", "train", synsets, 1_281_167) is None
    assert recognize("v2", "test", numbers, 10_000) == "imagenet-v2"
    assert recognize("a", "test", subset_synsets("imagenet-a")[::-1], None) == "imagenet-a"
    assert recognize("r", "test", subset_synsets("imagenet-r"), 5) == "imagenet-r"
    assert recognize("digits", "validation", numbers[:10], 360) is None
