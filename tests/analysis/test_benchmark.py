"""Tests of `scripts/benchmark.py`: interleaving, medians, ratios, contenders, memory, and the figure."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.path import Path as PlotPath
from PIL import Image
from timm.models.res2net import Bottle2neck as TimmBottle2neck

from res2net_zoo.analysis import benchmark, contenders
from res2net_zoo.analysis.benchmark import Result, fastest, peak, quartiles, ratio, verdict_lines
from res2net_zoo.analysis.contenders import Contender, Setting, Skipped, build, make_images, make_model, peak_memory
from res2net_zoo.analysis.cost import count
from res2net_zoo.utils.timing import by_turns
from tests.conftest import input_error

TINY = Setting("res2net_tiny", 2, "float32", "infer", (3, 64, 64), threads=1, matrix=64)
QUICK = ["--rounds", 2, "--seconds", 0, "--pause", 0, "--matrix", 64, "--img-size", 64, "--backend", "eager"]
QUICK += ["--peers", "eager", "--no-memory", "--threads", 1]  # several threads are slow on a busy machine


def result(who: str, how: str, *rounds: list[float], macs: int = 10**9, **setting) -> Result:
    return Result(Setting(**{**vars(TINY), **setting}), Contender(who, how), list(rounds), macs)


def test_quartiles():
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


def test_ratio_of_medians_and_quartiles_over_rounds():
    # The second round is slow for both, which affects neither the medians of all calls nor the round's ratio.
    ours = result("ours", "native", [0.1, 0.1], [0.9], [0.1, 0.1])
    theirs = result("timm", "eager", [0.2], [1.8], [0.3])
    found = ratio(ours, theirs)
    assert found.than == "timm eager" and found.ratio == pytest.approx(3)
    assert (found.low, found.high) == pytest.approx((2, 2.5))
    assert ours.images_per_second == pytest.approx(20)
    assert ours.macs_per_second == pytest.approx(10**10)


def test_verdicts_compare_with_the_fastest():
    results = [
        result("ours", "eager", [0.4], [0.4]),
        result("ours", "native", [0.1], [0.1]),
        result("timm", "eager", [0.3], [0.3]),
        result("timm", "openvino", [0.15], [0.15]),
        result("resnet50", "openvino", [0.08], [0.08]),
        result("matrix product", "torch", [0.05], [0.05]),
        result("matrix product", "openvino", [0.04], [0.04]),
    ]
    peers, resnet = verdict_lines(results)
    assert "ours native is 1.50 times as fast as the best peer, timm openvino (half of the rounds: 1.50" in peers
    assert "0.80 times as fast as the best ResNet-50, resnet50 openvino" in resnet
    assert peak(results) == pytest.approx(25 * 10**9)
    assert fastest(results, "plain") is None and list(verdict_lines(results[2:])) == []
    lines = benchmark.table(results).splitlines()[2:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names[:3] == ["resnet50 openvino", "ours native", "timm openvino"] and names[-1] == "matrix product torch"
    assert "40 %" in lines[1] and "100 %" in lines[-2]
    objects = benchmark.as_json(results, {"threads": 1})
    assert [len(row["faster_than"]) for row in objects] == [0, 2, 0, 0, 0, 0, 0]
    assert objects[1]["share_of_peak"] == pytest.approx(0.4)
    assert objects[1]["rounds_ms"] == pytest.approx([100, 100])


def test_interleaving_rotates_the_order_and_warms_up():
    done: list[str] = []
    calls = [lambda name=name: done.append(name) for name in "abc"]
    times = by_turns(calls, 2, pause=0)
    assert "".join(done) == "aabbcc" + "bbccaa" + "ccaabb"
    assert [[len(turn) for turn in turns] for turns in times] == [[1, 1]] * 3
    assert all(len(turn) > 1 for turns in by_turns(calls, 1, seconds=0.001) for turn in turns)


def test_macs_of_training_exclude_the_gradient_of_images():
    def build() -> torch.nn.Module:
        layers = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Conv2d(8, 4, 1, bias=False), torch.nn.Flatten()
        return torch.nn.Sequential(*layers)

    first, second = 3 * 8 * 9 * 36, 8 * 4 * 36
    assert count(build, (3, 8, 8)) == (248, first + second)
    assert count(build, (3, 8, 8), training=True) == (248, 2 * first + 3 * second)


def test_peer_is_timms_model_with_our_weights():
    setting = Setting("res2net50_26w_4s", 1, "float32", "infer", (3, 64, 64), threads=2)
    theirs, ours = make_model("timm", setting), make_model("ours", setting)
    assert any(isinstance(module, TimmBottle2neck) for module in theirs.modules())
    assert not any(isinstance(module, TimmBottle2neck) for module in ours.modules())
    images = make_images(setting)
    with torch.inference_mode():
        expected, found = theirs(images), ours(images)
    assert expected.std() > 1e-3  # residual branches are not zero
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    names = {str(c) for c in contenders.contenders(setting, ["auto"], ["eager"], ["timm", "resnet50"])}
    assert names >= {"ours auto", "timm eager", "resnet50 eager", "matrix product torch"}


def test_contenders_of_half_precision_and_of_training():
    def hows(who: str, **changes) -> list[str]:
        setting = Setting(**{**vars(TINY), "threads": 2, **changes})
        peers = ["eager", "inductor", "onnxruntime", "openvino"]
        return [c.how for c in contenders.contenders(setting, ["native"], peers, ["timm"]) if c.who == who]

    assert hows("plain", batch_size=1) == ["eager", "inductor", "onnxruntime", "openvino"]
    assert hows("plain", batch_size=4)[-1] == "openvino streams"
    assert hows("plain", precision="bfloat16")[:2] == ["eager", "eager autocast"]
    assert hows("ours") == ["native"]
    assert hows("ours", mode="train") == hows("plain", mode="train") == ["eager", "inductor"]
    assert hows("plain", device="cuda") == ["eager", "inductor"]
    assert hows("plain", precision="int8") == ["onnxruntime", "openvino", "openvino streams"]
    assert hows("matrix product", precision="int8") == ["openvino"]


def test_contender_with_wrong_results_is_skipped(monkeypatch, tmp_path):
    build(Contender("plain", "eager"), TINY, tmp_path)
    monkeypatch.setitem(contenders.INFERENCE, "eager", lambda *args: lambda: torch.zeros(2, 1000))
    with pytest.raises(Skipped, match="plain eager computes wrong results: its logits differ by 1 of"):
        build(Contender("plain", "eager"), TINY, tmp_path)


def test_memory_of_a_separate_process(tmp_path):
    setting = Setting(**{**vars(TINY), "batch_size": 64})
    taken = peak_memory(Contender("plain", "eager"), setting, tmp_path)
    if taken is None:
        pytest.skip("the system does not report memory")
    # The images take 3 MB and the first feature map 8 MB; this process with all its imports takes hundreds.
    assert 11 < taken < 300


def test_benchmark_of_inference_and_training(in_process, tmp_path):
    out = tmp_path / "results.json"
    what = ["--model", "res2net_tiny", "--batch-size", 1, 3, "--mode", "infer", "train"]
    run = in_process("scripts/benchmark.py", *what, *QUICK, "--output", out)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())
    settings = {(row["mode"], row["batch_size"]) for row in rows}
    assert settings == {("infer", 1), ("infer", 3), ("train", 1), ("train", 3)}
    whos = [row["contender"] for row in rows if (row["mode"], row["batch_size"]) == ("train", 3)]
    assert whos[:3] == ["ours eager", "plain eager", "resnet50 eager"]
    for row in rows:
        assert 0 < row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"]
        assert row["calls"] == 2 == len(row["rounds_ms"]) and row["threads"] == row["machine"]["threads"] == 1
        assert row["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
        assert row["error"] < 1e-2 and row["macs"] > 0 and row["share_of_peak"] > 0
    ours = [row for row in rows if row["who"] == "ours"]
    assert ours[1]["macs"] == 3 * ours[0]["macs"] and 2.5 < ours[2]["macs"] / ours[0]["macs"] < 3
    assert run.stdout.count("times as fast as the best peer, plain eager") == 4
    assert run.stdout.count("times as fast as the best ResNet-50, resnet50 eager") == 4
    assert "res2net_tiny, train, float32, batch 3, 64x64" in run.stdout


@pytest.mark.full
def test_benchmark_of_int8(in_process, tmp_path):
    out = tmp_path / "results.json"
    args = [word for word in QUICK if word not in ("--backend", "--peers", "eager")]
    args += ["--model", "res2net_tiny", "--precision", "int8", "--backend", "openvino", "--output", out]
    run = in_process("scripts/benchmark.py", *args, "--peers", "openvino", "onnxruntime", "eager")
    assert run.returncode == 0, run.stderr
    rows = {row["contender"]: row for row in json.loads(out.read_text())}
    peers = {f"{who} {how}" for who in ("plain", "resnet50") for how in ("openvino", "onnxruntime")}
    assert set(rows) == {"ours openvino", *peers, "matrix product openvino"}
    for name, row in rows.items():
        assert row["precision"] == "int8" and row["share_of_peak"] > 0
        assert name.startswith("matrix") or 1e-4 < row["error"] < 0.25  # rounded to 8 bits


def test_failing_contender_does_not_affect_others(in_process):
    args = [word for word in QUICK if word != "eager" and word not in ("--backend", "--peers")]
    args += ["--model", "res2net_tiny", "--backend", "cudagraphs", "--peers", "onnxruntime", "eager"]
    run = in_process("scripts/benchmark.py", *args, "--precision", "bfloat16", "--against", "timm")
    assert run.returncode == 1
    skipped = [line for line in run.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 2 and "ours cudagraphs: the backend is unavailable on this machine" in skipped[0], run.stderr
    assert "plain onnxruntime: bfloat16 convolutions are unsupported" in skipped[1]
    assert "| plain eager autocast" in run.stdout and "times as fast" not in run.stdout


def test_figure_of_all_models(tmp_path):
    names = benchmark.family()
    assert len(names) > 12 and "res2net200_vd_26w_4s" in names and "res2net_tiny" not in names
    assert benchmark.published_top1("res2net50_vd_26w_4s.pd_in1k") == 79.75
    results = []
    for batch_size, (i, name) in itertools.product((1, 8), enumerate(names)):
        r = result("ours", "native", [batch_size / (20 + 3 * i)], model=name, batch_size=batch_size)
        r.published_top1 = benchmark.published_top1(name)
        results.append(r)
    slower = result("ours", "eager", [9.0], model=names[0], batch_size=1)
    slower.published_top1 = results[0].published_top1
    results += [slower, result("resnet50", "openvino", [0.05], batch_size=1)]
    assert [[r.contender.how for r in panel] for panel in benchmark.panels(results)] == [["native"] * len(names)] * 2

    benchmark.draw(results, tmp_path / "family.png")
    assert Image.open(tmp_path / "family.png").size[0] > 1500
    figure = benchmark.figure(results)
    for axis, points in zip(figure.axes, (len(names) + 1, len(names)), strict=True):
        assert check_labels(axis) == points


def check_labels(axis: Axes) -> int:
    """Check that no label overlaps another label, a point or a line; return the number of labels."""
    boxes = [text.get_window_extent().padded(-1) for text in axis.texts if text.get_text()]  # -1: rounding
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    centres = [axis.transData.transform(line.get_xydata()) for line in axis.lines]
    assert not any(box.count_contains(points) for box, points in itertools.product(boxes, centres))
    assert all(axis.bbox.count_contains(box.corners()) == 4 for box in boxes)
    scale = axis.figure.dpi / 72
    ends = [
        (centre := axis.transData.transform(t.xy), centre + scale * np.array(t.xyann))
        for t in axis.texts
        if t.arrow_patch
    ]
    # Lines end 3 points before the label.
    lines = [PlotPath([a, a + (b - a) * 0.9]) for a, b in ends]
    assert not any(line.intersects_bbox(box, filled=False) for box, line in itertools.product(boxes, lines))
    assert not any(a.intersects_path(b, filled=False) for a, b in itertools.combinations(lines, 2))
    return len(boxes)


def test_labels_of_close_points():
    """Images per second, as measured for docs/family.png."""
    slow = {"res2net200_vd_26w_4s": 11.7, "res2net101_vd_26w_4s": 12.8, "res2net101d": 24.6, "res2net101_26w_4s": 23.4}
    slow |= {"res2net50_26w_8s": 24.7, "res2net50_26w_6s": 30.3}
    fast = {"res2net50_26w_4s": 46.4, "res2net50_48w_2s": 48.7, "res2net50_14w_8s": 46.6, "res2next50": 45.6}
    fast |= {"res2net50d": 43.7, "res2net50_vd_26w_4s": 44.3, "res2net50_pd_26w_4s": 45.7, "res2net50_pd_14w_8s": 43.1}
    fast |= {"dla60_res2net": 46.8, "dla60_res2next": 49.1}
    results = [result("resnet50", "openvino", [1 / 52.2])]
    for name, speed in (slow | fast).items():
        results.append(result("ours", "native", [1 / speed], model=name))
        results[-1].published_top1 = benchmark.published_top1(name)
    figure = benchmark.figure(results)
    (axis,) = figure.axes
    assert check_labels(axis) == len(results)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "res2net51"], "there is no model res2net51"),
        (["--batch-size", "0"], "0 is not 1 or more"),
        (["--precision", "int4"], "int4"),
        (["--precision", "int8", "--mode", "train"], "--precision int8 is for inference; remove --mode train"),
        (["--peers", "all", "eager"], "--peers takes all, none, or names"),
        pytest.param(
            ["--device", "cuda"],
            "device cuda: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--output", "docs"], "docs is a folder; name a file"),
        (["--output", "no/such/folder/a.json"], "cannot write into"),
        (["--figure", "a.docx"], "the name of a figure must end in"),
        (["--figure", "a.png", "--output", "a.png"], "are both a.png; name two files"),
        (["--figure", "a.png", "--mode", "train"], "--figure draws inference"),
        (["--figure", "a.png", "--model", "res2net_tiny"], "none is known for res2net_tiny"),
    ],
)
def test_invalid_input(in_process, args, words):
    assert words in input_error(in_process("scripts/benchmark.py", *args))


def test_figure_needs_matplotlib(in_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = input_error(in_process("scripts/benchmark.py", "--figure", Path("a.png")))
    assert "drawing needs matplotlib" in error


def test_matrix_products_restore_the_precision():
    """Otherwise torch.compile recompiles models while they are timed."""
    before = torch.backends.cuda.matmul.allow_tf32
    product = contenders._product("torch", Setting(**{**vars(TINY), "device": "meta"}))
    assert product().shape == (64, 64)
    assert torch.backends.cuda.matmul.allow_tf32 == before
