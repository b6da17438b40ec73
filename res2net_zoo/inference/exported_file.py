"""Reading an exported file, ONNX or OpenVINO IR, to report what it is. Its network is never run.

The precision is derived from the graph: from the types of the weights, and from the operations that quantize
activations. Files may come from anywhere, so that their size is limited and nothing in them is executed.
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from res2net_zoo.inference.export import FORMATS, SECTION
from res2net_zoo.utils.errors import InputError, first_line
from res2net_zoo.utils.files import open_regular, read_bytes
from res2net_zoo.utils.packages import require

if TYPE_CHECKING:
    import onnx

LARGEST_ONNX = 2**31 - 1  # bytes; the limit of the format
LARGEST_XML = 2**26  # bytes; the .xml of res2net200_vd_26w_4s has 4 MB
LARGEST_BIN = 2**33  # bytes
DEEPEST = 20  # operations between a weight and the layer that uses it, such as Convert and Multiply

# Operations with weights, and the position of the weights among their inputs.
LAYERS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger"), 1),
    **dict.fromkeys(("Convolution", "GroupConvolution", "ConvolutionBackpropData"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
}
QUANTIZING = {"QuantizeLinear", "DynamicQuantizeLinear", "FakeQuantize"}
# Operations on constants through which the type of weights is looked up.
CONVERTING = {*QUANTIZING, "DequantizeLinear", "Cast", "Convert", "Multiply", "Mul", "Subtract", "Sub", "Reshape",
              "Transpose", "Identity"}  # fmt: skip
WITH_BODIES = {"If", "Loop", "Scan", "TensorIterator"}
BYTES = {"int8", "uint8"}
OPENVINO_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}


class Node(NamedTuple):
    """An operation of a graph, or a constant.

    Attributes:
        name: Its name.
        op: Its type; `Const` for a constant.
        inputs: Keys of the nodes that its inputs come from, in order.
        dtype: Type of a constant.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    dtype: str = ""


@dataclass(frozen=True)
class ExportedFile:
    """What an exported file is.

    Attributes:
        path: The file.
        files: It and, for an IR, the file of its weights.
        version: Its format, such as `ONNX opset 18` or `OpenVINO IR 11`.
        layers: Name of each convolution and fully connected layer, and type of its weights.
        quantizes: Whether activations are quantized.
        metadata: Its metadata, such as those of `export_metadata`.
    """

    path: Path
    files: tuple[Path, ...]
    version: str
    layers: tuple[tuple[str, str], ...]
    quantizes: bool
    metadata: dict[str, str]

    @property
    def precision(self) -> str:
        """Precision of the network: `int8` if activations and weights are quantized, else the types of the weights."""
        types = Counter(dtype for _, dtype in self.layers)
        if self.quantizes and "int8" in types:
            return "int8"
        return " and ".join(f"{name} weights" if name == "int8" else name for name, _ in types.most_common())

    @property
    def float_layers(self) -> list[str]:
        """Names of the layers that are not quantized."""
        return [name for name, dtype in self.layers if dtype != "int8"]


def is_exported_file(name: str) -> bool:
    """Return whether a name has the suffix of an exported file."""
    return Path(name).suffix in FORMATS.values()


def read(path: Path) -> ExportedFile:
    """Read an exported file.

    Args:
        path: The .onnx or .xml file.

    Raises:
        InputError: It is missing, too large, truncated, damaged, or not such a file.
    """
    return _read_onnx(path) if path.suffix == FORMATS["onnx"] else _read_ir(path)


def _read_onnx(path: Path) -> ExportedFile:
    require("reading an ONNX file needs", "export", "onnx")
    import onnx

    content = read_bytes(path, LARGEST_ONNX)
    try:
        proto = onnx.ModelProto.FromString(content)
        nodes = _onnx_nodes(proto)
        versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except Exception as error:  # protobuf's own types
        raise InputError(f"{path} is not a complete ONNX file: {first_line(error)}") from error
    if not versions or not proto.graph.output:
        raise InputError(f"{path} is not a complete ONNX file: it has no graph or no opset")
    return _described(path, (path,), f"ONNX opset {versions[0]}", nodes, metadata)


def _onnx_nodes(proto: "onnx.ModelProto") -> dict[str, Node]:
    """Return the operations and constants of an ONNX model, by the names of their outputs."""
    import onnx

    if proto.functions:
        raise InputError("it has functions, which no exported model has")
    nodes: dict[str, Node] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(f"the weights {tensor.name} are in another file, which is not read")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        wanted = prod(tensor.dims) * np.dtype(dtype).itemsize
        if tensor.HasField("raw_data") and dtype.name != "object" and len(tensor.raw_data) < wanted // 2:
            raise InputError(f"the weights {tensor.name} have {len(tensor.raw_data):,} of {wanted:,} bytes")
        nodes[tensor.name] = Node(tensor.name, "Const", dtype=dtype.name)
    for node in proto.graph.node:
        value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            made = Node(node.name, "Const", dtype=onnx.helper.tensor_dtype_to_np_dtype(value.data_type).name)
        else:
            made = Node(node.name, node.op_type, tuple(node.input))
        nodes |= dict.fromkeys(node.output, made)
    return nodes


def _read_ir(path: Path) -> ExportedFile:
    weights = path.with_suffix(".bin")
    content = read_bytes(path, LARGEST_XML)
    with open_regular(weights) as file:
        size = file.seek(0, 2)
    if size > LARGEST_BIN:
        raise InputError(f"{weights} is larger than the limit of {LARGEST_BIN:,} bytes")
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDoctype()))
        if root.tag != "net":
            raise ValueError(f"it starts with <{root.tag[:40]}> instead of <net>")
        nodes, end = _ir_nodes(root)
    except (ElementTree.ParseError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a complete OpenVINO IR: {first_line(error)}") from error
    if end > size:
        raise InputError(f"{weights} is truncated, or of another IR: it has {size:,} of {end:,} bytes")
    section = root.find(f"rt_info/{SECTION}")
    metadata = {} if section is None else {entry.tag: entry.get("value", "") for entry in section}
    return _described(path, (path, weights), f"OpenVINO IR {root.get('version')}", nodes, metadata)


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, whose entities may expand to any length."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which no IR has")


def _ir_nodes(root: ElementTree.Element) -> tuple[dict[str, Node], int]:
    """Return the operations and constants of an IR by their ids, and the size in bytes that its weights need."""
    inputs: dict[str, dict[int, str]] = {}
    for edge in root.iterfind("edges/edge"):
        inputs.setdefault(edge.attrib["to-layer"], {})[int(edge.attrib["to-port"])] = edge.attrib["from-layer"]
    nodes, end = {}, 0
    for layer in root.iterfind("layers/layer"):
        name, data = layer.attrib["name"], layer.find("data")
        dtype = ""
        if layer.attrib["type"] == "Const" and data is not None:
            dtype = OPENVINO_TYPES.get(data.attrib["element_type"], data.attrib["element_type"])
            end = max(end, int(data.attrib["offset"]) + int(data.attrib["size"]))
        sources = inputs.get(layer.attrib["id"], {})
        ordered = tuple(sources[port] for port in sorted(sources))
        nodes[layer.attrib["id"]] = Node(name, layer.attrib["type"], ordered, dtype)
    return nodes, end


def _described(
    path: Path, files: tuple[Path, ...], version: str, nodes: Mapping[str, Node], metadata: dict[str, str]
) -> ExportedFile:
    """Return what a graph is.

    Raises:
        InputError: It lacks layers with weights, or has parts that are not inspected.
    """
    unique = list({id(node): node for node in nodes.values()}.values())
    if bodies := sorted({node.op for node in unique} & WITH_BODIES):
        raise InputError(f"{path} has an operation with a graph of its own ({bodies[0]}), which no exported model has")
    layers = tuple(_layers(unique, nodes))
    if not layers:
        raise InputError(f"{path} has no convolution and no fully connected layer, so it is not an exported model")
    quantizes = any(
        (node.op in QUANTIZING and not (node.inputs and _constant(node.inputs[0], nodes)))
        or node.op.startswith("QLinear")
        for node in unique
    )
    return ExportedFile(path, files, version, layers, quantizes, metadata)


def _layers(unique: Iterable[Node], nodes: Mapping[str, Node]) -> Iterable[tuple[str, str]]:
    """Yield name and type of the weights of each layer."""
    for node in unique:
        place = LAYERS.get(node.op)
        if place is None or len(node.inputs) <= place:
            continue
        if found := _constant(node.inputs[place], nodes):
            constant, quantized = found
            name = constant.name.removesuffix("_compressed").removesuffix(".weight")
            yield (node.name, "int8") if quantized else (name, constant.dtype)


def _constant(key: str, nodes: Mapping[str, Node]) -> tuple[Node, bool] | None:
    """Return the constant that a value is computed from, and whether it is quantized; None for other values."""
    quantized = False
    for _ in range(DEEPEST):
        node = nodes.get(key)
        if node is None:
            return None
        if node.op == "Const":
            return node, quantized or node.dtype in BYTES
        if node.op not in CONVERTING or not node.inputs:
            return None
        quantized |= node.op in QUANTIZING
        key = node.inputs[0]
    return None
