"""Write mindspore_small*.ckpt as MindSpore does: `save_checkpoint` of named tensors."""

import mindspore

from tests.weights.originals.draw import HERE, tensors


def main() -> None:
    entries = [{"name": name, "data": mindspore.Tensor(value)} for name, value in tensors("mindspore").items()]
    for name, options in (("mindspore_small", {}), ("mindspore_small_crc", dict(crc_check=True))):
        path = HERE / f"{name}.ckpt"
        mindspore.save_checkpoint(entries, str(path), **options)
        path.chmod(0o644)  # MindSpore leaves it 0400
        assert set(mindspore.load_checkpoint(str(path))) == {entry["name"] for entry in entries}


if __name__ == "__main__":
    main()
