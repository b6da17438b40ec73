"""YAML metadata of cards that expands to gigabytes or contains itself is refused before parsing."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from res2net_zoo.data.sources import open_source
from res2net_zoo.hub.publish import check_folder
from res2net_zoo.utils import card_metadata
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights.provenance import of_folder
from res2net_zoo.weights.published import published_accuracies
from res2net_zoo.weights.verification import verify

SHIPPED = Path(__file__).parents[2] / "hub" / "models" / "res2net_tiny.digits"


def repeated(number: int, value: str) -> str:
    return f"[{', '.join([value] * number)}]"


def nested(inner: str, outer: str, levels: int = 9) -> str:
    lines = [f"a{i}: &a{i} {outer.format(repeated(10, f'*a{i - 1}'))}" for i in range(1, levels)]
    return "\n".join([f"a0: &a0 {inner}", *lines])


METRICS = f"""\
m: &m {{type: accuracy, value: 1.0}}
ms: &ms {repeated(1000, "*m")}
r: &r {{task: {{type: image-classification}}, dataset: {{type: imagenet-1k, name: x}}, metrics: *ms}}
rs: &rs {repeated(1000, "*r")}
model-index: {repeated(1000, "{name: x, results: *rs}")}"""

BOMBS = {
    "results": (METRICS, "limit of 262,144"),
    "lists": (nested("[x]", "{}"), "limit of 262,144"),
    "merges": (nested("{x: 1}", "{{<<: {}}}"), "limit of 262,144"),
    "itself": ("configs: &a [*a]", "refers to the anchor a,"),
    "deep": (f"x: {'[' * 60}{']' * 60}", "nested more than 50 deep"),
    "number": (f"x: {'59:' * 100_000}59", "number of more than 100 characters"),
}


@pytest.mark.first_case
@pytest.mark.parametrize("name", BOMBS)
def test_expanding_metadata_is_refused_by_all_readers(tmp_path, name):
    bomb, bound = BOMBS[name]
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    (folder / "README.md").write_text(f"---\nlicense: mit\n{bomb}\n---\n\nText\n")
    with pytest.raises(InputError, match=bound):
        check_folder(folder, verify)
    assert of_folder(folder).license == "apache-2.0"  # from its config
    assert published_accuracies(f"local-dir:{folder}") == []
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "1.png")
    shutil.copy(folder / "README.md", tmp_path / "data")
    with pytest.raises(InputError, match=bound):
        open_source(str(tmp_path / "data"))


def test_card_with_few_anchors_is_read(tmp_path):
    card = "---\nlicense: mit\na: &a [x, y]\nb: *a\nc: &c {k: *a}\nd: {<<: *c, n: 1}\n---\n\nText\n"
    (tmp_path / "README.md").write_text(card)
    data = card_metadata.read_card(tmp_path / "README.md").data.to_dict()
    assert (data["b"], data["d"]) == (["x", "y"], {"k": ["x", "y"], "n": 1})
