"""What the page of `res2net-zoo space` shows, without a browser."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from res2net_zoo import catalog
from res2net_zoo.space import uploads
from res2net_zoo.space.drawing import draw
from res2net_zoo.space.models import Models, WeightsUnreachableError, call_of, distinct
from res2net_zoo.space.uploads import decode_upload
from res2net_zoo.space.wiring import Variant, costs, wiring_of
from res2net_zoo.utils.errors import InputError
from tests.conftest import ROOT, SHIPPED_MODEL

SHIPPED = f"local-dir:{SHIPPED_MODEL}"
EXAMPLES = ROOT / "hub" / "space" / "examples"


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_without_gradio_one_line_names_the_extra():
    code = "import sys; sys.modules['gradio'] = None; from res2net_zoo.cli import main; sys.exit(main(['space']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "the page needs gradio; pip install 'res2net-zoo[space]'" in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image of a supported format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a supported format"),
        (encoded(Image.new("RGB", (32, 32)), "PNG")[:60], "damaged"),
        (
            encoded(Image.new("L", (8, 8)), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)]),
            "animated",
        ),
        (encoded(Image.new("L", (8000, 8000)), "PNG"), "8000 x 8000 pixels; the limit is 50 million"),
    ],
    ids=["empty", "svg", "cut", "animated", "large"],
)
def test_unsuitable_images_are_refused_in_one_sentence(content, reason):
    with pytest.raises(InputError, match=reason) as error:
        decode_upload(content, "RGB")
    assert re.fullmatch(r"The [^\n]*\.", str(error.value))


def test_uploads_are_upright_and_limited(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    content = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert decode_upload(content, "L").size == (20, 40)
    (tmp_path / "image.jpg").write_bytes(content)
    assert uploads.read_upload(tmp_path / "image.jpg") == content
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="larger than"):
        uploads.read_upload(tmp_path / "image.jpg")


@pytest.fixture(scope="module")
def models() -> Models:
    pytest.importorskip("pytorch_grad_cam")
    return Models(Accelerator(cpu=True), "torch", SHIPPED)


@pytest.mark.parametrize("digit", [3, 5, 8])
def test_the_shipped_model_recognizes_the_examples(models, digit):
    content = (EXAMPLES / f"digit_{digit}.png").read_bytes()
    answer = models.load(SHIPPED).answer(decode_upload(content, "RGB"))
    assert next(iter(answer.scores)) == str(digit) and len(answer.scores) == 5
    assert answer.scores[str(digit)] > 0.9 and answer.backend == "torch" and answer.milliseconds > 0
    assert (
        answer.heat.shape == answer.picture.shape[:2] == (64, 64) and 0 <= answer.heat.min() <= answer.heat.max() <= 1
    )


def test_the_code_on_the_page_gives_the_same_scores(models, tmp_path, monkeypatch):
    content = (EXAMPLES / "digit_5.png").read_bytes()
    (tmp_path / "image.jpg").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(call_of(SHIPPED), found)
    answer = models.load(SHIPPED).answer(decode_upload(content, "RGB"))
    top = found["scores"].detach().topk(5)
    np.testing.assert_allclose(list(answer.scores.values()), top.values, atol=1e-5)
    assert list(answer.scores) == [str(int(i)) for i in top.indices]


def test_models_are_limited_to_those_offered_and_four_are_kept(models, tiny_folder):
    for name in ("resnet18", "local-dir:/etc", f"local-dir:{tiny_folder}"):
        with pytest.raises(InputError, match="does not offer"):
            models.load(name)
    with pytest.raises(WeightsUnreachableError, match=r"res2net50_26w_4s\.in1k cannot be fetched"):
        models.load("res2net50_26w_4s.in1k")
    own = Models(models.accelerator, "torch", SHIPPED, [f"local-dir:{tiny_folder}"])
    assert own.first == (f"local-dir:{tiny_folder}", None) and own.load(own.first[0]).names == list("0123456789")
    assert models.load(SHIPPED) is models.load(SHIPPED)
    for name in models.names[1:6]:
        with pytest.raises(InputError):
            models.load(name)
    assert len(models._slots) == 4


def test_class_names_are_distinct():
    assert distinct(["crane", "tench", "crane"]) == ["crane (0)", "tench", "crane (2)"]


def test_the_table_has_the_whole_catalogue_and_filters():
    pd = pytest.importorskip("pandas")
    from res2net_zoo.space.catalogue import call, card, matching, measure, names, table

    everything = catalog.load()
    frame = table({"res2net_tiny": 12.34})
    assert set(frame["model"]) == set(names()) >= set(everything.checkpoints)
    assert {name.partition(".")[0] for name in frame["model"]} == set(everything.architectures)
    assert list(frame[frame["model"] == "res2net_tiny"]["images/s"]) == [12.3]
    apache = matching(frame, "apache VD", 100, 83)
    assert set(apache["model"]) == {name for name in frame["model"] if "_vd_" in name and "ssld" in name}
    assert matching(frame, "", 20, 0)["params (M)"].max() <= 20 and not len(matching(frame, "no such", 100, 0))
    assert pd.isna(frame.set_index("model")["top-1"]["res2net_tiny"])
    for name in names():
        assert card(name).startswith(f"### {name}\n") and name in call(name)
    assert "pretrained" not in call("res2net_tiny") and "85.13" in card("res2net200_vd_26w_4s.ssld_in1k")
    ours = Models(Accelerator(cpu=True), "torch", SHIPPED)
    assert [name for name, speed in measure(ours, ["res2net_tiny"]) if speed > 1] == ["res2net_tiny"]


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net101_26w_4s", "res2next29_6c_24w_4s"])
def test_costs_of_catalogue_models_match_the_catalogue(name):
    variants = {
        "res2net50_26w_4s": Variant(),
        "res2net101_26w_4s": Variant(depth=101),
        "res2next29_6c_24w_4s": Variant("cifar", 29, 6, 24, 4),
    }
    known, found = catalog.load().architectures[name], costs(variants[name])
    assert (found.parameters, found.macs, found.size) == (known.parameters, known.macs, known.input_size[1])


def test_the_code_of_a_variant_builds_it():
    variant = Variant(depth=50, cardinality=2, width=12, scale=3, wiring="paddle")
    found: dict = {}
    with torch.device("meta"):
        exec(variant.call(), found)
    assert sum(p.numel() for p in found["model"].parameters()) == costs(variant).parameters


@pytest.mark.parametrize("variant", [Variant(depth=60), Variant("cifar", depth=30), Variant(cardinality=2000)])
def test_impossible_variants_are_refused(variant):
    for work in (lambda: costs(variant), lambda: wiring_of(variant, False)):
        with pytest.raises(InputError):
            work()


@pytest.mark.parametrize("wiring", ["official", "paddle", "mmdet"])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_the_drawing_shows_the_block_as_it_is_wired(wiring, scale):
    variant = Variant(scale=scale, wiring=wiring)
    other, first = wiring_of(variant, False), wiring_of(variant, True)
    # One addition a group after the second, and the shortcut's; arrows in between.
    assert draw(other).count("<circle") == max(0, scale - 2) + 1 and draw(first).count("<circle") == 1
    assert draw(other).count(">3x3<") == max(1, scale - 1) and "pool" not in draw(other)
    assert draw(first).count(">3x3, /2<") == max(1, scale - 1)
    assert draw(first).count(">pool 3x3, /2<") == (scale > 1)
    assert "identity" in draw(other) and "1x1 projection" in draw(first)
    assert other.fields == ([3] if scale == 1 else [2 * i + 1 for i in range(scale)])
    assert set(first.fields) == {3}
