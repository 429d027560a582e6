"""Weights in FP8 with a scale for each block, as DeepSeek-V3's are published.

DeepSeek-V3 (arXiv:2412.19437, §3.3.2): the weight of a matrix's element is its FP8 number times the
scale of its block of 128 × 128 elements. They are multiplied when a tensor is read.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from layers.config import check
from research.models.fields import Fields

FP8 = "F8_E4M3"  # the dtype's name in safetensors
SCALE = "_scale_inv"  # a tensor's name and this is the name of its scales
_SCALE_DTYPES = ("F32", "BF16")


def dequantize(weight_nm: np.ndarray, scale_ij: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """``weight · scale`` of its block, float32 ``[n, m]``; the last blocks may be smaller.

    Args:
      weight_nm: FP8 numbers.
      scale_ij: ``[⌈n / block[0]⌉, ⌈m / block[1]⌉]``.
    """
    n, m = weight_nm.shape
    # a block may be larger than the matrix, and is not larger in memory
    rows, columns = min(block[0], n), min(block[1], m)
    scale = scale_ij.astype(np.float32)
    scale = scale.repeat(rows, axis=0)[:n].repeat(columns, axis=1)[:, :m]
    return weight_nm.astype(np.float32) * scale


def read_block(fields: Fields) -> tuple[int, int] | None:
    """The sizes of blocks, from ``quantization_config`` of a config.json; None if it has none.

    Raises:
      ConfigError: another method or form of quantisation.
    """
    if "quantization_config" not in fields:
        fields.unused("quantization_config")
        return None
    quantization = fields.object("quantization_config")
    quantization.text("quant_method", choices=("fp8",))
    quantization.text("fmt", "e4m3", choices=("e4m3",))
    # activations are not quantised: products are at least as exact as with FP8
    for name in ("activation_scheme", "scale_fmt", "modules_to_not_convert"):
        quantization.unused(name)
    sizes = quantization.items("weight_block_size")
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        quantization.refuse("weight_block_size", sizes, "must be two integers > 0")
    return sizes[0], sizes[1]


class Tensors(Protocol):
    """What reads a checkpoint's tensors; `header` gives a tensor's shape and dtype."""

    @property
    def names(self) -> Iterator[str]: ...
    def header(self, name: str) -> tuple[tuple[int, ...], str]: ...
    def read(self, name: str, rows: slice = ...) -> np.ndarray: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *_) -> None: ...


class DequantizedReader:
    """The tensors of ``reader``; those with scales are dequantised, and the scales are left out.

    Raises:
      ConfigError: names a tensor without scales, scales without a tensor, a wrong dtype or shape.
    """

    def __init__(self, reader: Tensors, block: tuple[int, int]):
        self._reader, self._block = reader, block
        names = set(reader.names)
        self._scaled = {n for n in names if n + SCALE in names and not n.endswith(SCALE)}
        for name in names:
            self._check(name)

    def _check(self, name: str) -> None:
        shape, dtype = self._reader.header(name)
        if name.endswith(SCALE):
            paired = name.removesuffix(SCALE) in self._scaled
            check(paired, "tensor", name, "is the scale of a tensor that does not exist")
        elif name not in self._scaled:
            check(dtype != FP8, "tensor", name, f"is {dtype}: requires {name}{SCALE}")
        else:
            check(dtype == FP8, f"tensor {name}", dtype, f"must be {FP8}: it has scales")
            check(len(shape) == 2, f"tensor {name}", list(shape), "must be a matrix: it has scales")
            blocks = [-(-n // m) for n, m in zip(shape, self._block, strict=True)]
            actual, dtype = self._reader.header(name + SCALE)
            requirement = f"must have shape {blocks}: one for each block of {name}"
            check(list(actual) == blocks, f"tensor {name}{SCALE}", list(actual), requirement)
            requirement = f"must be {' or '.join(_SCALE_DTYPES)}"
            check(dtype in _SCALE_DTYPES, f"tensor {name}{SCALE}", dtype, requirement)

    def __enter__(self) -> "DequantizedReader":
        self._reader.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._reader.__exit__(*error)

    @property
    def names(self) -> Iterator[str]:
        return (name for name in self._reader.names if not name.endswith(SCALE))

    @property
    def count(self) -> int:
        """The number of tensors that are dequantised."""
        return len(self._scaled)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The tensor's shape and dtype after it is dequantised."""
        shape, dtype = self._reader.header(name)
        return shape, "F32" if name in self._scaled else dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows."""
        if name not in self._scaled:
            return self._reader.read(name, rows)
        weight, scale = self._reader.read(name), self._reader.read(name + SCALE)
        return dequantize(weight, scale, self._block)[rows]
