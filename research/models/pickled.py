"""Reads dictionaries of tensors that PyTorch pickled: pytorch_model.bin and RWKV-7's files."""

import importlib.util
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.config import ConfigError, check

# PyTorch's name of a dtype → that of safetensors
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
# dtypes that NumPy lacks: name in PyTorch → an integer of the same size, and JAX's dtype
_OTHER = {"bfloat16": ("uint16", jnp.bfloat16), "float8_e4m3fn": ("uint8", jnp.float8_e4m3fn)}


class PickledFile:
    """The tensors of a file, mapped into memory: `read` reads one from disk.

    The unpickler makes tensors and plain containers only (``weights_only``). Files in the format
    before PyTorch 1.6 cannot be mapped; they are read at once.

    Raises:
      ConfigError: the file does not exist, is not a dictionary of tensors, or torch is missing.
    """

    def __init__(self, path: Path):
        check(path.is_file(), "file", str(path), "does not exist")
        torch = require_torch(path)
        try:
            mapped = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
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
        self.tensors: dict[str, Any] = tensors

    def keys(self) -> Iterator[str]:
        """The names of the tensors."""
        return iter(self.tensors)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The tensor's shape and dtype, named as in a safetensors file."""
        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return tuple(tensor.shape), _DTYPES.get(dtype, dtype)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows; tensors that share memory become separate arrays."""
        tensor = self.tensors[name].detach()[rows].contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _OTHER:
            return tensor.numpy()
        bits, array_dtype = _OTHER[dtype]
        torch = importlib.import_module("torch")
        return tensor.view(getattr(torch, bits)).numpy().view(array_dtype)


def require_torch(path: Path) -> ModuleType:
    """The module ``torch``; raises `ConfigError` that names ``path`` if it is not installed."""
    installed = importlib.util.find_spec("torch") is not None
    check(installed, "file", str(path), "requires PyTorch: pip install torch")
    return importlib.import_module("torch")
