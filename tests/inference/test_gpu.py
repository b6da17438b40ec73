"""Tests of the GPU backends in realistic use; they need an NVIDIA GPU, except for the size of graphs."""

import threading
import warnings

import pytest
import timm
import torch

import res2net_zoo
from res2net_zoo.inference.backends import GRAPHS, graph_size
from tests.conftest import relative_error, spread

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.fixture(scope="module", params=["triton", "cudagraphs"])
def fast(request, tmp_path_factory):
    """A small model, and the same optimized for 3 images."""
    model = spread(timm.create_model("res2net_tiny")).eval().cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimized = res2net_zoo.optimize(
            model, images(3, 3, 64, 64), "float16", request.param, cache_dir=tmp_path_factory.mktemp("cache")
        )
    return model, optimized


def check(fast, batch: torch.Tensor) -> None:
    model, optimized = fast
    with torch.no_grad():
        assert relative_error(optimized(batch), model(batch.float())) < 1e-2


def test_numbers_of_images_share_graphs():
    assert [graph_size(n, usual=48) for n in (1, 2, 3, 5, 32, 33, 47, 48, 49, 65)] == [
        1, 2, 4, 8, 32, 48, 48, 48, 64, 128
    ]  # fmt: skip


@needs_gpu
def test_float32_is_replaced(tmp_path):
    model = timm.create_model("res2net_tiny").eval().cuda()
    with pytest.warns(UserWarning, match="triton.*it supports bfloat16 and float16 only"):
        optimized = res2net_zoo.optimize(model, images(1, 3, 64, 64), "float32", "triton", cache_dir=tmp_path)
    assert optimized.backend in ("cudagraphs", "eager")


@needs_gpu
def test_any_number_size_strides_and_type(fast):
    for n in (3, 1, 2, 5, 7, 0):
        batch = images(n, 3, 64, 64)
        check(fast, batch) if n else None
        assert fast[1](batch).shape == (n, 1000)
    for size in ((40, 72), (97, 33), (64, 64)):
        check(fast, images(2, 3, *size))
    batch = images(4, 3, 64, 64)
    check(fast, batch.contiguous(memory_format=torch.channels_last))
    check(fast, batch[:, :, ::2, ::2])
    check(fast, batch[:1].expand(3, -1, -1, -1))
    check(fast, batch.double())
    check(fast, batch.half())
    check(fast, batch)
    assert len(fast[1].call.graphs.made) <= GRAPHS


@needs_gpu
def test_nan_stays_in_its_image(fast):
    batch = images(3, 3, 64, 64)
    expected = fast[1](batch)
    batch[1, 0, 5, 5] = float("nan")
    found = fast[1](batch)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(fast[1](batch[:1]), fast[1](batch[:1]))
    assert fast[1](images(3, 3, 64, 64)).isfinite().all()


@needs_gpu
def test_threads_and_streams(fast):
    _, optimized = fast
    batches = [images(3, 3, 64, 64) + i for i in range(8)]
    expected = [optimized(batch) for batch in batches]
    found: dict[int, torch.Tensor] = {}
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[i] = optimized(batches[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


@needs_gpu
def test_capture_while_other_threads_allocate(fast):
    """A loader pins memory while a graph of another size is captured."""
    stop = threading.Event()
    errors: list[Exception] = []

    def pin() -> None:
        while not stop.is_set():
            try:
                torch.empty(1 << 20).pin_memory().cuda(non_blocking=True)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for size in (56, 72, 80):
            check(fast, images(2, 3, size, 56))
    finally:
        stop.set()
        thread.join()
    assert not errors


@needs_gpu
def test_graph_from_inference_mode(fast):
    with torch.inference_mode():
        fast[1](images(2, 3, 48, 40))
    check(fast, images(2, 3, 48, 40))


@needs_gpu
def test_images_on_another_device(fast):
    with pytest.raises(ValueError, match="the images are on cpu, the optimized model is on cuda:0"):
        fast[1](torch.zeros(1, 3, 64, 64))
