"""What an ONNX or OpenVINO graph holds: the types of its weights, found without the packages that compute it.

ONNX files are protobuf messages (https://protobuf.dev/programming-guides/encoding/) of the fields in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; only the lengths of tensors are read, never their numbers.
"""

import mmap
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# Numbers of fields: of a model, its graph; of a graph, its weights; of a tensor, what is asked for here.
_GRAPH, _WEIGHTS = 7, 5
_SHAPE, _TYPE, _OUTSIDE = 1, 2, 13

# ONNX's number of a type -> its name as safetensors has it; others are rare in graphs of encoders.
_TYPES = {1: "F32", 2: "U8", 3: "I8", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16"}


def read_graph(path: Path) -> dict[str, Any]:
    """Count the weights of a graph: `numbers`, `dtypes` and the `bytes` of all its files.

    Raises:
        ValueError: it is cut off, is no such graph, or lacks the file with its weights.
        OSError: it cannot be read.
    """
    dtypes, files = _read_openvino(path) if path.suffix == ".xml" else _read_onnx(path)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{', '.join(missing)}, which holds weights, is not beside it")
    size = sum(file.stat().st_size for file in files)
    return {"numbers": dtypes.total(), "dtypes": dict(dtypes.most_common()), "bytes": size}


def _read_onnx(path: Path) -> tuple[Counter[str], list[Path]]:
    dtypes: Counter[str] = Counter()
    outside: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for graph in _messages(data, slice(0, len(data)), _GRAPH):
            for tensor in _messages(data, graph, _WEIGHTS):
                shape, kind, places = _tensor(data, tensor)
                dtypes[_TYPES.get(kind, f"type {kind}")] += prod(shape)
                outside |= places
    if not dtypes:
        raise ValueError("it holds no weights")
    return dtypes, [path, *(path.with_name(name) for name in sorted(outside))]


def _tensor(data: mmap.mmap, place: slice) -> tuple[list[int], int, set[str]]:
    """Shape, number of the type, and names of the files with its numbers, of a weight."""
    shape: list[int] = []
    kind, places = 0, set()
    for field, value in _fields(data, place):
        if field == _SHAPE:
            shape += [value] if isinstance(value, int) else _packed(data, value)
        elif field == _TYPE and isinstance(value, int):
            kind = value
        elif field == _OUTSIDE and isinstance(value, slice):
            entry = [str(data[part], "utf-8") for _, part in _fields(data, value) if isinstance(part, slice)]
            places |= set(entry[1:]) if entry[0] == "location" else set()
    return shape, kind, places


def _messages(data: mmap.mmap, place: slice, wanted: int) -> Iterator[slice]:
    return (value for field, value in _fields(data, place) if field == wanted and isinstance(value, slice))


def _fields(data: mmap.mmap, place: slice) -> Iterator[tuple[int, int | slice]]:
    """Number and value of each field of a message: an integer, or where a text, message or list is."""
    position = place.start
    while position < place.stop:
        key, position = _varint(data, position)
        field, form = key >> 3, key & 7
        if form == 0:
            number, position = _varint(data, position)
            yield field, number
            continue
        if form not in (1, 2, 5):
            raise ValueError("it is no ONNX file")
        size, position = _varint(data, position) if form == 2 else ({1: 8, 5: 4}[form], position)
        if position + size > place.stop:
            raise ValueError("it is cut off, or no ONNX file")
        yield field, slice(position, position + size)
        position += size


def _packed(data: mmap.mmap, place: slice) -> list[int]:
    position, numbers = place.start, []
    while position < place.stop:
        number, position = _varint(data, position)
        numbers.append(number)
    return numbers


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """An integer, seven bits a byte, and the position behind it."""
    number = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position
    raise ValueError("it is cut off, or no ONNX file")


def _read_openvino(path: Path) -> tuple[Counter[str], list[Path]]:
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    dtypes: Counter[str] = Counter()
    end = 0
    for constant in tree.iterfind("layers/layer[@type='Const']/data"):
        shape = [int(size) for size in constant.attrib["shape"].split(",") if size]
        dtypes[constant.attrib["element_type"].upper()] += prod(shape)
        end = max(end, int(constant.attrib["offset"]) + int(constant.attrib["size"]))
    weights = path.with_suffix(".bin")
    if not dtypes:
        raise ValueError("it holds no weights")
    if weights.exists() and weights.stat().st_size < end:
        raise ValueError(f"{weights.name}, which holds its weights, is cut off")
    return dtypes, [path, weights]
