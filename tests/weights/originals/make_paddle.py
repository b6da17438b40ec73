"""Write paddle_small*.pdparams as PaddlePaddle does: `paddle.save` of a layer's state dict."""

import sys

import paddle

from tests.weights.originals.draw import HERE, tensors


def make(values: dict) -> paddle.nn.Layer:
    """Build a tree of layers with given parameters and no computation."""
    root = paddle.nn.Layer()
    for name, value in values.items():
        *parents, leaf = name.split(".")
        layer = root
        for parent in parents:
            if parent not in layer._sub_layers:
                layer.add_sublayer(parent, paddle.nn.Layer())
            layer = layer._sub_layers[parent]
        # PaddlePaddle's batch norm also stores running statistics as parameters.
        param = layer.create_parameter(list(value.shape))
        param.set_value(value)
        layer.add_parameter(leaf, param)
    return root


def main() -> None:
    suffix = sys.argv[1] if sys.argv[1:] else ""
    values = tensors("paddle")
    state = make(values).state_dict()
    assert set(state) == set(values)
    paddle.save(state, str(HERE / f"paddle_small{suffix}.pdparams"))
    # The default of PaddlePaddle 2.0; later 4.
    paddle.save(state, str(HERE / f"paddle_small{suffix}_protocol2.pdparams"), protocol=2)


if __name__ == "__main__":
    main()
