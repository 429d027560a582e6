"""Reads and writes RWKV-7's files: a dictionary of tensors, pickled by PyTorch."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from layers.config import check
from research.files import write_atomically
from research.models.pickled import PickledFile, require_torch

SUFFIX = ".pth"
ARCHITECTURE = "RWKV_x070"


class PthReader(PickledFile):
    """The tensors of a ``.pth`` file."""

    def __enter__(self) -> "PthReader":
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}

    @property
    def names(self) -> Iterator[str]:
        return self.keys()

    def describe(self) -> dict[str, Any]:
        """A config.json for the file, which has none, from the shapes of its tensors."""

        def shape(name: str, axes: int) -> tuple[int, ...]:
            check(name in self.tensors, "tensor", name, f"is missing: not an {ARCHITECTURE}")
            sizes = tuple(self.tensors[name].shape)
            check(len(sizes) == axes, f"tensor {name}", list(sizes), f"must have {axes} axes")
            return sizes

        block = "blocks.0."
        _, head_dim = shape(block + "att.r_k", 2)
        vocab_size, width = shape("emb.weight", 2)
        numbers = [re.match(r"blocks\.(\d+)\.", name) for name in self.tensors]
        layers = 1 + max(int(match[1]) for match in numbers if match)
        ranks = {
            field: shape(f"{block}att.{letter}1", 2)[1]
            for field, letter in (("decay_rank", "w"), ("rate_rank", "a"), ("gate_rank", "g"))
        }
        # the first layer has no earlier values to mix with
        value = f"blocks.{min(1, layers - 1)}.att.v1"
        ranks["value_rank"] = shape(value, 2)[1] if layers > 1 or value in self.tensors else 1
        return {
            "architectures": [ARCHITECTURE],
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "head_dim": head_dim,
            "intermediate_size": shape(block + "ffn.key.weight", 2)[0],
            **ranks,
            "dtype": str(self.tensors["emb.weight"].dtype).removeprefix("torch."),
        }


def write_pth(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Write ``tensors``, all of which are in memory, to ``path`` atomically.

    Raises:
      ConfigError: torch is not installed.
    """
    torch = require_torch(path)

    def to_torch(array: np.ndarray):
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    converted = {name: to_torch(array) for name, array in tensors.items()}
    write_atomically(path, lambda temporary: torch.save(converted, temporary))
