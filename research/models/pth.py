"""RWKV-7's own files: a dictionary of tensors that PyTorch has pickled, and nothing beside them."""

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


class PthReader:
    """The tensors of a ``.pth`` file, mapped into memory: each is read from disk when asked for.

    The unpickler makes tensors and plain containers only (``weights_only``).

    Raises:
      ConfigError: no such file, no torch to read it with, or not a dictionary of tensors.
    """

    def __init__(self, path: Path):
        check(path.is_file(), "file", str(path), "is not there")
        torch = _torch(path)
        try:
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"file={str(path)!r}: cannot be read: {why}") from None
        whole = isinstance(held, dict) and all(isinstance(v, torch.Tensor) for v in held.values())
        check(whole, "file", str(path), "is no dictionary of tensors")
        self._held: dict[str, Any] = held

    def __enter__(self) -> "PthReader":
        return self

    def __exit__(self, *_) -> None:
        self._held = {}

    @property
    def names(self) -> Iterator[str]:
        return iter(self._held)

    def read(self, name: str) -> np.ndarray:
        tensor = self._held[name].detach().contiguous()
        if str(tensor.dtype) == "torch.bfloat16":  # which NumPy has not
            import torch

            return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    def describe(self) -> dict[str, Any]:
        """The config.json that the file has none of, from the shapes of its tensors."""

        def shape(name: str, axes: int) -> tuple[int, ...]:
            check(name in self._held, "tensor", name, f"is missing: no {ARCHITECTURE}")
            found = tuple(self._held[name].shape)
            check(len(found) == axes, f"tensor {name}", list(found), f"must have {axes} axes")
            return found

        block = "blocks.0."
        _, head_dim = shape(block + "att.r_k", 2)
        vocab_size, width = shape("emb.weight", 2)
        numbers = [re.match(r"blocks\.(\d+)\.", name) for name in self._held]
        layers = 1 + max(int(found[1]) for found in numbers if found)
        ranks = {
            field: shape(f"{block}att.{letter}1", 2)[1]
            for field, letter in (("decay_rank", "w"), ("rate_rank", "a"), ("gate_rank", "g"))
        }
        # the first layer has no values to mix with its own
        value = f"blocks.{min(1, layers - 1)}.att.v1"
        ranks["value_rank"] = shape(value, 2)[1] if layers > 1 or value in self._held else 1
        return {
            "architectures": [ARCHITECTURE],
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "head_dim": head_dim,
            "intermediate_size": shape(block + "ffn.key.weight", 2)[0],
            **ranks,
            "dtype": str(self._held["emb.weight"].dtype).removeprefix("torch."),
        }


def write_pth(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write ``tensors``, all of them in memory, to ``path``, which appears whole or not at all.

    Raises:
      ConfigError: no torch to write it with.
    """
    torch = _torch(path)

    def of_torch(array: np.ndarray):
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    held = {name: of_torch(array) for name, array in tensors.items()}
    write_atomically(path, lambda temporary: torch.save(held, temporary))


def _torch(path: Path) -> ModuleType:
    there = importlib.util.find_spec("torch") is not None
    check(there, "file", str(path), "needs PyTorch, which is not installed: pip install torch")
    return importlib.import_module("torch")
