"""Reading labelled images with `datasets`: all kinds of sources, splits, labels, bad input."""

import io
import json
import shutil
import socket
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from res2net_zoo.data.images import EXTENSIONS, FORMATS, Samples, decode, find_images, open_image, read_named, to_mode
from res2net_zoo.data.sources import open_source
from res2net_zoo.utils.errors import InputError
from tests.conftest import SHIPPED_DATA, save_images


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(n: int, classes: int = 3) -> datasets.Dataset:
    """Return n images with their index as grey value, and its remainder as label."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(classes)])}
    )
    images = [{"bytes": png(i), "path": None} for i in range(n)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % classes for i in range(n)]}, features=features)


def greys(source) -> list[tuple[int, int]]:
    """Return grey value and label of every image."""
    return [(decode(source.read(row["image"]), "L").getpixel((0, 0)), row["label"]) for row in source.rows]


EXPECTED = [(i, i % 3) for i in range(7)]


def make_parquet(folder: Path) -> str:
    dataset(7).to_parquet(folder / "val.parquet")
    return str(folder / "val.parquet")


def make_parquet_folder(folder: Path) -> str:
    (folder / "data").mkdir()
    dataset(7).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    dataset(3).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)


def make_parquet_shards(folder: Path) -> str:
    for i in range(3):
        dataset(7).select(range(7)[i * 3 : i * 3 + 3]).to_parquet(folder / f"val-{i}.parquet")
    return str(folder / "val-*.parquet")


def make_saved(folder: Path) -> str:
    datasets.DatasetDict({"validation": dataset(7), "train": dataset(3)}).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def make_arrow(folder: Path) -> str:
    dataset(7).save_to_disk(str(folder / "saved"))
    path = folder / "validation.arrow"
    next((folder / "saved").glob("*.arrow")).rename(path)
    return str(path)


def make_webdataset(folder: Path) -> str:
    for shard in range(2):
        with tarfile.open(folder / f"val-{shard}.tar", "w") as tar:
            for i in range(7)[shard * 4 : shard * 4 + 4]:
                for name, content in ((f"{i:04}.png", png(i)), (f"{i:04}.cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "val-*.tar")


KINDS = [make_parquet, make_parquet_folder, make_parquet_shards, make_saved, make_arrow, make_webdataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", KINDS)
def test_reads_all_file_formats(tmp_path, make, streaming):
    source = open_source(make(tmp_path), streaming=streaming)
    assert source.split == "validation"
    assert greys(source) == EXPECTED
    unknown = streaming and make in (make_arrow, make_webdataset)  # known only after reading
    assert source.num_rows == (None if unknown else 7)
    assert source.class_names == (None if make is make_webdataset else ["c0", "c1", "c2"])


@pytest.mark.parametrize("streaming", [False, True])
def test_reads_class_folders_with_any_names(tmp_path, streaming):
    """`datasets` would interpret these as splits, or a single one as no label."""
    save_images(tmp_path / "val", ["bus", "test tube", "train"], 2)
    source = open_source(str(tmp_path / "val"), streaming=streaming)
    assert (source.split, source.class_names) == ("validation", ["bus", "test tube", "train"])
    assert [row["label"] for row in source.rows] == [0, 0, 1, 1, 2, 2]
    save_images(tmp_path / "one", ["only"], 2)
    assert open_source(str(tmp_path / "one")).class_names == ["only"]


def test_images_without_class_folders_have_no_labels(tmp_path):
    save_images(tmp_path, ["flat"], 3)
    with pytest.raises(InputError, match="no column of labels"):
        open_source(str(tmp_path / "flat"))
    shutil.copy(tmp_path / "flat" / "0.jpg", tmp_path / "stray.jpg")
    assert open_source(str(tmp_path)).class_names == ["flat"]


def tree(folder: Path, *names: str) -> Path:
    """Write images to these paths in a folder; their grey values are their indices."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_in_names_are_not_patterns(tmp_path, streaming):
    """`datasets` interprets given names as patterns."""
    folder = tree(tmp_path / "d[1]", "a[1]/1.png", "a[1]/x1.png", "a[1]/x[1].png", "b/*.png", "c/0?.png")
    source = open_source(str(folder), streaming=streaming)
    assert source.class_names == ["a[1]", "b", "c"]
    assert sorted(greys(source)) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    (tmp_path / "p").mkdir()
    for name in ("val1.parquet", "val[1].parquet"):
        dataset(7 if "[" in name else 2).to_parquet(tmp_path / "p" / name)
    both = open_source(str(tmp_path / "p" / "val*.parquet"), streaming=streaming)
    assert greys(both) == [(0, 0), (1, 1), *EXPECTED]


@pytest.mark.parametrize("streaming", [False, True])
def test_follows_links(tmp_path, streaming):
    tree(tmp_path / "elsewhere", "real_c/2.png")
    folder = tree(tmp_path / "data", "a/0.png", "b/1.png")
    (folder / "c").symlink_to(tmp_path / "elsewhere" / "real_c")
    (folder / "b" / "9.png").symlink_to(folder / "a" / "0.png")
    source = open_source(str(folder), streaming=streaming)
    assert source.class_names == ["a", "b", "c"]
    assert [label for _, label in greys(source)] == [0, 1, 1, 2]


def test_readme_next_to_class_folders_is_ignored(tmp_path):
    tree(tmp_path, "only/0.png")
    (tmp_path / "README.md").write_text("# My images")
    assert open_source(str(tmp_path)).class_names == ["only"]


def test_images_without_labels(tmp_path):
    """ImageNet's original val folder is flat; ImageNet-ReaL has labels by file name."""
    tree(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    for streaming in (False, True):
        source = open_source(str(tmp_path / "val"), labelled=False, streaming=streaming)
        made = [
            Samples(lambda image: image, "L", lambda label, path: label, source.read)("here", row)
            for row in source.rows
        ]
        assert [sample.target for sample in made] == [None, None]
        assert all("ILSVRC2012_val_0000000" in sample.place and sample.image is not None for sample in made)


def test_reads_splits_of_class_folders(tmp_path):
    save_images(tmp_path / "train", ["a", "b"], 3)
    save_images(tmp_path / "val", ["a", "b"], 1)
    assert len(open_source(str(tmp_path)).rows) == 2
    assert len(open_source(str(tmp_path), "train").rows) == 6
    assert open_source(str(tmp_path), "val").split == "validation"
    with pytest.raises(InputError, match="no split test; it has train, validation"):
        open_source(str(tmp_path), "test")


def test_shipped_digits():
    for streaming in (False, True):
        source = open_source(str(SHIPPED_DATA), streaming=streaming)
        assert (source.name, source.split) == ("digits", "validation")
        assert source.class_names == [str(i) for i in range(10)]
        assert sum(1 for _ in source.rows) == 360


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("images", ["", "images"])
@pytest.mark.parametrize("split", ["", "validation"])
def test_folders_with_metadata_files(tmp_path, streaming, images, split):
    """Their subfolders are not classes."""
    for part in (split, "train") if split else ("",):
        names = [str(Path(images) / f"{i}.png") for i in range(3)]
        tree(tmp_path / "data" / part, *names)
        rows = "\n".join(f"{name},{(i + 1) % 3}" for i, name in enumerate(names))
        (tmp_path / "data" / part / "metadata.csv").write_text(f"file_name,label\n{rows}\n")
    source = open_source(str(tmp_path / "data"), streaming=streaming)
    assert source.split == (split or "train")
    assert sorted(greys(source)) == [(0, 1), (1, 2), (2, 0)]


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["", "door", "crash test"])
@pytest.mark.parametrize(
    "name", ["metadata.txt", "metadata.json", "metadata.csv", "metadata.jsonl", "metadata.parquet"]
)
def test_unrelated_metadata_files_are_ignored(tmp_path, streaming, place, name):
    """`datasets` would read two of these classes as a test split, and ignore the others."""
    names = ("crash test", "door", "engine test", "wheel")
    data = tree(tmp_path / "data", *(f"{name}/{i}.png" for name in names for i in range(4)))
    (data / place / name).write_text("camera,date\nA,2020\n")
    source = open_source(str(data), streaming=streaming)
    assert source.class_names == list(names) and source.split == "train"
    assert greys(source) == [(i, i // 4) for i in range(16)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_with_file_names_is_read(tmp_path, kind):
    data = tree(tmp_path, "0.png", "sub/1.png")
    rows = datasets.Dataset.from_dict({"label": [7, 8], "file_name": ["0.png", "sub/1.png"]})
    write = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind]
    write(data / f"metadata.{kind}")
    assert sorted(greys(open_source(str(data)))) == [(0, 7), (1, 8)]


def test_class_named_like_a_split(tmp_path):
    tree(tmp_path / "flat", "bus/0.png", "test/1.png", "train/2.png")
    assert greys(open_source(str(tmp_path / "flat"))) == [(0, 0), (1, 1), (2, 2)]
    for name in ("train", "test", "Eval"):
        data = tree(tmp_path / name, "bus/0.png", "car/1.png", f"{name}/steam/2.png")
        with pytest.raises(InputError, match=rf"named as splits .*\({name}\) next to others .*\(bus, car\)"):
            open_source(str(data))
    twice = tree(tmp_path / "twice", "train/a/0.png", "val/a/1.png", "validation/a/2.png")
    with pytest.raises(InputError, match="two folders for the split validation, val and validation"):
        open_source(str(twice))
    # A test split without labels and folders without images are not classes.
    splits = tree(tmp_path / "splits", "train/a/0.png", "val/a/1.png", "test/2.png", "train/.cache/a/3.png")
    (splits / "annotations").mkdir()
    assert greys(open_source(str(splits))) == [(1, 0)]


@pytest.mark.parametrize("streaming", [False, True])
def test_system_files_are_skipped_and_counted(tmp_path, streaming):
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    hidden = ("cat/@eaDir/0.png/THUMB.jpg", "cat/.ipynb_checkpoints/0.png", "dog/.thumbnails/x.png", "@eaDir/a.png",
              "__MACOSX/cat/0.png", "dog/._0.png", "dog/Thumbs.db")  # fmt: skip
    data = tree(tmp_path, *names, *hidden, "dog/notes.TXT", "dog/a.heic", "dog/b.heic", "stray.png")
    (data / "empty").mkdir()
    source = open_source(str(data), streaming=streaming)
    assert source.class_names == ["cat", "dog", "empty"]
    assert greys(source) == [(i, i // 3) for i in range(6)]
    for words in (
        "hidden or system folders: 5 (such as ",
        f".heic files: 2 (such as {data}/dog/a.heic)",
        f".txt files: 1 (such as {data}/dog/notes.TXT)",
        f"class folders without images: 1 (such as {data}/empty)",
        f"images outside of class folders: 1 (such as {data}/stray.png)",
    ):
        assert words in source.skipped
    assert "Thumbs" not in source.skipped
    assert open_source(str(tree(tmp_path / "clean", "a/0.png")), streaming=streaming).skipped == ""


def test_image_extensions_match_supported_formats(tmp_path):
    Image.init()
    registered = {end for end, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert registered == EXTENSIONS
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    names = ["a.GIF", "b.jfif", "c.jpe", "d.avif", "e.JP2", "f.mpo", "g.Tif", "h.pbm", "i.apng"]
    kinds = dict(zip(names, ("GIF", "JPEG", "JPEG", "AVIF", "JPEG2000", "MPO", "TIFF", "PPM", "PNG"), strict=True))
    for name, kind in kinds.items():
        Image.new("1" if kind == "PPM" else "RGB", (8, 8), 1).save(folder / name, kind)
    source = open_source(str(folder.parent))
    assert [Path(row["image"]["path"]).name for row in source.rows] == names
    assert all(decode(source.read(row["image"]), "RGB").size == (8, 8) for row in source.rows)
    assert [Path(path).name for path in find_images([str(folder)])] == names


def test_link_to_itself_is_unreadable(tmp_path):
    data = tree(tmp_path / "data", "cat/0.png", "dog/1.png")
    for link in ("cat/x.png", "self"):
        (data / link).symlink_to(data / link)
    assert [Path(path).name for path in find_images([str(data)])] == ["0.png", "x.png", "1.png"]
    source = open_source(str(data))
    assert source.num_rows == 3 and source.class_names == ["cat", "dog"]
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        source.read(source.rows[1]["image"])


def test_circular_links_are_followed_once(tmp_path):
    data = tree(tmp_path / "data", "cat/0.png", "cat/more/1.png", "dog/2.png")
    tree(tmp_path / "elsewhere", "bird/0.png")
    for link, target in (
        ("cat/up", "."), ("cat/more/up", "cat"), ("dog/also", "cat"), ("all", "."), ("cats", "cat"), ("two", ".."),
        ("cat/more/a", "cat/more"), ("cat/more/b", "cat/more"), ("bird", "../elsewhere/bird"),
    ):  # fmt: skip
        (data / link).symlink_to((data / target).resolve())
    start = time.perf_counter()
    source = open_source(str(data))
    assert source.class_names == ["bird", "cat", "dog"]
    assert greys(source) == [(0, 0), (0, 1), (1, 1), (2, 2)]
    assert "links to parent folders or folders already included: 8 (such as" in source.skipped
    names = [Path(path).relative_to(tmp_path) for path in find_images([str(data)])]
    assert sorted(str(path) for path in names) == [
        "data/bird/0.png", "data/cat/0.png", "data/cat/more/1.png", "data/dog/2.png"
    ]  # fmt: skip
    assert len(find_images([str(data / "**" / "*.png")])) == 4
    assert len(find_images([str(data / "cat" / "**" / "[01].png"), str(data / "cats")])) == 2
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.arrow"])
def test_images_next_to_data_files_are_refused(tmp_path, name):
    for place in ("", "data/deep"):
        folder = tree(tmp_path / f"beside{len(place)}", "a/0.png", "b/1.png", "data/deep/images/2.png")
        shutil.copy(make_parquet(tmp_path), folder / place / name)
        with pytest.raises(
            InputError, match=rf"has images .*and also .*{name}; move that elsewhere .*or name the file"
        ):
            open_source(str(folder))


@pytest.mark.parametrize("stray", [False, True])
def test_parquet_in_subfolders_or_next_to_other_files(tmp_path, stray):
    for split, n in (("train", 3), ("validation", 7)):
        folder = tmp_path / split if stray else tmp_path / "default" / split
        folder.mkdir(parents=True)
        dataset(n).to_parquet(folder / "0000.parquet")
        if stray:
            (folder / "_SUCCESS").touch()
    assert greys(open_source(str(tmp_path))) == EXPECTED


def test_pattern_separates_splits(tmp_path):
    for name, n in (("train-0", 3), ("validation-0", 7)):
        dataset(n).to_parquet(tmp_path / f"{name}.parquet")
    assert greys(open_source(str(tmp_path / "*.parquet"))) == EXPECTED
    assert len(open_source(str(tmp_path / "*.parquet"), "train").rows) == 3


def test_column_named_image_is_used(tmp_path):
    rows = dataset(7).rename_column("image", "mask").add_column("image", [png(i + 100) for i in range(7)])
    rows = rows.cast_column("image", datasets.Image()).select_columns(["mask", "image", "label"])
    rows.to_parquet(tmp_path / "val.parquet")
    assert greys(open_source(str(tmp_path / "val.parquet"))) == [(i + 100, i % 3) for i in range(7)]


def test_label_column(tmp_path):
    rows = dataset(4).rename_column("label", "species").add_column("coarse", [1, 1, 0, 0])
    rows.to_parquet(tmp_path / "test.parquet")
    assert [r["label"] for r in open_source(str(tmp_path / "test.parquet")).rows] == [0, 1, 2, 0]
    coarse = open_source(str(tmp_path / "test.parquet"), label_column="coarse")
    assert [r["label"] for r in coarse.rows] == [1, 1, 0, 0] and coarse.class_names is None


@pytest.mark.parametrize("streaming", [False, True])
def test_exif_orientation_is_ignored(tmp_path, streaming):
    """As in timm; `datasets` would rotate the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (20, 10)).save(folder / "0.jpg", exif=exif)
    source = open_source(str(tmp_path), streaming=streaming)
    assert decode(source.read(next(iter(source.rows))["image"]), "RGB").size == (20, 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    """Pillow would convert nearly all values to 255."""
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for part in (values, values // 16):  # also for an image with fewer bits, such as of a 12-bit camera
        buffer = io.BytesIO()
        Image.fromarray(part).save(buffer, kind)
        grey, colour = (np.asarray(decode(buffer.getvalue(), mode)) for mode in ("L", "RGB"))
        assert (grey == np.round(part / 257)).all() and (colour == grey[:, :, None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_are_converted_as_timm_does(mode):
    image = Image.effect_noise((20, 20), 90).convert(mode)
    for target in ("RGB", "L"):
        assert to_mode(image, target).tobytes() == image.convert(target).tobytes()


def test_exif_orientation_of_sixteen_bit_images():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind, exif=exif)
        with open_image(buffer.getvalue()) as image:
            assert np.asarray(to_mode(image, "L", upright=True)).tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "name is empty"),
        ("no/such/folder/at/all", "there is no folder or file no/such/folder/at/all; name"),
        ("missing.parquet", "there is no folder or file missing.parquet; name"),
        ("some_org/some_dataset", "there is no folder or file some_org/some_dataset; the Hub cannot be reached"),
    ],
)
def test_missing_data(name, words):
    with pytest.raises(InputError, match=words):
        open_source(name)


@pytest.mark.parametrize(
    "word", ["../no_images", "./no_images", "~/no_images", "a/b/no_images", "no\\images", "/no/images"]
)
def test_paths_are_not_requested_from_the_hub(hub, tmp_path, monkeypatch, word):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"^there is no folder or file .*images; name a folder"):
        open_source(word)
    assert not hub.requests


def test_tilde_expands_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tree(tmp_path, "data/a/0.png")))
    assert greys(open_source("~/data")) == [(0, 0)]
    assert find_images(["~/data"]) == find_images(["~/data/a/*.png"]) == [str(tmp_path / "data/a/0.png")]


def test_misspelt_names_get_suggestions(hub, tmp_path, monkeypatch):
    tree(tmp_path, "my_images/train/a/0.png")
    monkeypatch.chdir(tmp_path)
    for word, near in (("my_imagse", "my_images"), ("my_images/trian", "my_images/train"), ("./my_image", "my_images")):
        with pytest.raises(InputError, match=rf"there is no folder or file {word}.*did you mean .*{near}\?"):
            open_source(word)
    with pytest.raises(InputError, match=r"nothing_near, and no dataset of this name on the Hub; check the name"):
        open_source("nothing_near")


@pytest.mark.parametrize("silent", [False, True])
def test_unreachable_hub_is_reported_immediately(monkeypatch, silent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("res2net_zoo.data.sources.HUB_TIMEOUT", 1)
        if not silent:
            server.close()
        start = time.perf_counter()
        with pytest.raises(InputError, match="there is no folder or file my_imagse, and the Hub cannot be reached"):
            open_source("my_imagse")
        assert time.perf_counter() - start < 5


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    data = make_parquet(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    for streaming in (False, True):
        with pytest.raises(
            InputError, match=r"cannot write into the cache .*file/cache: Not .*; set HF_HOME to a writ"
        ):
            open_source(data, streaming=streaming)
    assert greys(open_source(str(tree(tmp_path / "folders", "a/0.png")))) == [(0, 0)]


def test_unreadable_data(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("bad.parquet", "notes.txt", "empty"):
        with pytest.raises(InputError, match=name.split(".")[0]):
            open_source(str(tmp_path / name))


def encoded(grey: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, kind)
    return buffer.getvalue()


def save_shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_several_image_formats(tmp_path, streaming):
    """`datasets` creates a column for each extension in the first samples, and ignores others."""
    kinds = [("jpg", "JPEG")] * 6 + [("png", "PNG"), ("WEBP", "WEBP"), ("Jpeg", "JPEG"), ("bmp", "BMP")]
    members = [
        (f"a/{i:02}.{name}", content)
        for i, (end, kind) in enumerate(kinds)
        for name, content in ((end, encoded(20 * i, kind)), ("CLS" if i == 7 else "cls", b"%d\n" % (i % 3)))
    ]
    save_shard(tmp_path / "val-0.tar", ("a/._00.jpg", b"AppleDouble"), *members[:14])
    save_shard(tmp_path / "val-1.tar", *members[14:], ("a/10.jpg", encoded(200, "JPEG")), ("a/11.json", b"no JSON"))
    source = open_source(str(tmp_path / "val-*.tar"), streaming=streaming)
    rows = list(source.rows)
    made = [(decode(source.read(row["image"]), "L").getpixel((0, 0)), row["label"]) for row in rows[:11]]
    assert made == [*((20 * i, i % 3) for i in range(10)), (200, None)]
    assert [row["image"]["path"] for row in rows[6:8]] == ["a/06.png", "a/07.WEBP"]
    assert [row["image"] for row in rows[11:]] == [None]


@pytest.mark.parametrize("label", [b"x", b"1.5", b"", b"9" * 30])
def test_shard_labels_must_be_integers(tmp_path, label):
    save_shard(tmp_path / "val.tar", ("0.png", png(0)), ("0.cls", label))
    with pytest.raises(InputError, match=rf"the label {label[:20].decode()} is not a whole number"):
        open_source(str(tmp_path / "val.tar"))


@pytest.mark.first_case
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: 512 * 4],  # cut between two images
        lambda content: content[: 512 * 5 + 100],
        lambda content: content[: 512 * 4] + b"damaged " * 64 + content[512 * 5 :],
    ],
)
def test_truncated_or_damaged_tar_file(tmp_path, streaming, damage):
    """Tar readers interpret the damage as the end, so that images would be missing."""
    make_webdataset(tmp_path)
    (tmp_path / "bad.tar").write_bytes(damage((tmp_path / "val-0.tar").read_bytes()))
    with pytest.raises(InputError, match=r"(truncated|complete tar file).* download it again"):
        open_source(str(tmp_path / "bad.tar"), streaming=streaming)


def test_missing_columns(tmp_path):
    rows = dataset(3)
    rows.remove_columns("label").to_parquet(tmp_path / "no_label.parquet")
    rows.remove_columns("image").to_parquet(tmp_path / "no_image.parquet")
    rows.remove_columns("label").add_column("label", ["x", "y", "z"]).to_parquet(tmp_path / "words.parquet")
    for name, words in (
        ("no_label", "no column of labels"),
        ("no_image", "no column of images; its columns are label"),
        ("words", "has no integer class labels"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(str(tmp_path / f"{name}.parquet"))
    rows.to_parquet(tmp_path / "good.parquet")
    with pytest.raises(InputError, match="no column colour; its columns are image, label"):
        open_source(str(tmp_path / "good.parquet"), label_column="colour")


def test_several_splits_without_an_evaluation_split(tmp_path):
    datasets.DatasetDict({"train": dataset(3), "more": dataset(3)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="choose one: train, more") as error:
        open_source(str(tmp_path / "saved"))
    assert error.value.parameters == ("split",)


def test_columns_of_other_types(tmp_path):
    datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).to_parquet(tmp_path / "numbers.parquet")
    for streaming in (False, True):
        with pytest.raises(InputError, match="no column of images"):
            open_source(str(tmp_path / "numbers.parquet"), streaming=streaming)
    bare = datasets.Dataset.from_dict({"image": [png(3), png(4)], "label": [0, 1]})
    bare.to_parquet(tmp_path / "bare.parquet")
    assert greys(open_source(str(tmp_path / "bare.parquet"))) == [(3, 0), (4, 1)]


def test_corrupt_image_is_returned_as_an_error(tmp_path):
    save_images(tmp_path, ["a"], 2)
    content = (tmp_path / "a" / "0.jpg").read_bytes()
    (tmp_path / "a" / "0.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "a" / "2.jpg").write_bytes(b"")
    rows = open_source(str(tmp_path)).rows
    samples = Samples(lambda image: image, "RGB", lambda label, path: [label], read_named)
    made = [samples(f"image {i}", row) for i, row in enumerate(rows)]
    assert [sample.corrupt is None for sample in made] == [False, True, False]
    assert "0.jpg" in made[0].place and "truncated" in made[0].corrupt


def test_only_the_chosen_split_is_converted(tmp_path):
    """Validation must not download and convert a training split of 140 GB."""
    folder = Path(make_parquet_folder(tmp_path))
    train = folder / "data" / "train-00000-of-00001.parquet"
    train.write_bytes(train.read_bytes()[:-40])  # cannot be read any more
    assert greys(open_source(str(folder))) == EXPECTED


def test_shipped_digits_without_metadata(tmp_path):
    shutil.copytree(SHIPPED_DATA / "data", tmp_path / "data")
    assert json.dumps(open_source(str(tmp_path)).class_names) == json.dumps([str(i) for i in range(10)])
