"""Reads and writes RWKV-7's files: a dictionary of tensors, pickled by PyTorch."""

import importlib.util
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.config import ConfigError, check
from research.files import write_atomically

SUFFIX = ".pth"
ARCHITECTURE = "RWKV_x070"
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class PthReader:
    """The tensors of a ``.pth`` file, mapped into memory: `read` reads one from disk.

    The unpickler makes tensors and plain containers only (``weights_only``).

    Raises:
      ConfigError: the file does not exist, is not a dictionary of tensors, or torch is missing.
    """

    def __init__(self, path: Path):
        check(path.is_file(), "file", str(path), "does not exist")
        torch = _torch(path)
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's message advises to unpickle without protection
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it contains {found[1]}, not tensors alone" if found else "it is damaged"
            raise ConfigError(f"file={str(path)!r}: cannot be read: {reason}") from None
        except Exception as error:  # damaged bytes end in any error of the unpickler
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"file={str(path)!r}: cannot be read: {reason}") from None
        valid = isinstance(tensors, dict) and all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()
        )
        check(valid, "file", str(path), "must be a dictionary of tensors")
        size = path.stat().st_size
        for name, tensor in tensors.items():
            stored = tensor.layout == torch.strided and tensor.device.type == "cpu"
            stored = stored and tensor.numel() * tensor.element_size() <= size
            check(stored, "tensor", name, "must be dense and in the file")
        self._tensors: dict[str, Any] = tensors

    def __enter__(self) -> "PthReader":
        return self

    def __exit__(self, *_) -> None:
        self._tensors = {}

    @property
    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The tensor's shape and dtype, named as in a safetensors file."""
        tensor = self._tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return tuple(tensor.shape), _DTYPES.get(dtype, dtype)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows."""
        tensor = self._tensors[name].detach()[rows].contiguous()
        if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no bfloat16
            import torch

            return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    def describe(self) -> dict[str, Any]:
        """A config.json for the file, which has none, from the shapes of its tensors."""

        def shape(name: str, axes: int) -> tuple[int, ...]:
            check(name in self._tensors, "tensor", name, f"is missing: not an {ARCHITECTURE}")
            sizes = tuple(self._tensors[name].shape)
            check(len(sizes) == axes, f"tensor {name}", list(sizes), f"must have {axes} axes")
            return sizes

        block = "blocks.0."
        _, head_dim = shape(block + "att.r_k", 2)
        vocab_size, width = shape("emb.weight", 2)
        numbers = [re.match(r"blocks\.(\d+)\.", name) for name in self._tensors]
        layers = 1 + max(int(match[1]) for match in numbers if match)
        ranks = {
            field: shape(f"{block}att.{letter}1", 2)[1]
            for field, letter in (("decay_rank", "w"), ("rate_rank", "a"), ("gate_rank", "g"))
        }
        # the first layer has no earlier values to mix with
        value = f"blocks.{min(1, layers - 1)}.att.v1"
        ranks["value_rank"] = shape(value, 2)[1] if layers > 1 or value in self._tensors else 1
        return {
            "architectures": [ARCHITECTURE],
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "head_dim": head_dim,
            "intermediate_size": shape(block + "ffn.key.weight", 2)[0],
            **ranks,
            "dtype": str(self._tensors["emb.weight"].dtype).removeprefix("torch."),
        }


def write_pth(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write ``tensors``, all of which are in memory, to ``path`` atomically.

    Raises:
      ConfigError: torch is not installed.
    """
    torch = _torch(path)

    def to_torch(array: np.ndarray):
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    converted = {name: to_torch(array) for name, array in tensors.items()}
    write_atomically(path, lambda temporary: torch.save(converted, temporary))


def _torch(path: Path) -> ModuleType:
    installed = importlib.util.find_spec("torch") is not None
    check(installed, "file", str(path), "requires PyTorch: pip install torch")
    return importlib.import_module("torch")
