"""The peer of `research.benchmark.train`: the same decoder in plain PyTorch, written to be fast.

Pre-norm blocks of RMSNorm, rotary attention and SwiGLU, with tied embeddings. One matrix product
computes queries, keys and values, and one computes gate and up. Queries and keys are rotated
together, with tables that are computed once. Attention is PyTorch's.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from layers.decoder import Decoder, DecoderConfig
from layers.stack import unstacked
from layers.weights import flat


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.mixer_norm = nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_btd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, d = x_btd.shape
        qkv = self.qkv(self.mixer_norm(x_btd)).view(b, t, 3, self.heads, -1)
        first, second = qkv[:, :, :2].chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        q, k, v = (a.transpose(1, 2) for a in (*rotated.unbind(2), qkv[:, :, 2]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_btd = x_btd + self.out(y.transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.mlp_norm(x_btd)).chunk(2, dim=-1)
        return x_btd + self.down(F.silu(gate) * up)


class TorchDecoder(nn.Module):
    """``forward(tokens, targets)``: int64 ``[b, t]`` each → the mean cross-entropy in nats."""

    def __init__(
        self, *, vocab: int, width: int, layers: int, heads: int, hidden: int, time: int,
        base: float, eps: float,
    ):  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(layers))
        self.final_norm = nn.RMSNorm(width, eps)
        c = width // heads
        theta = base ** (-torch.arange(0, c, 2, dtype=torch.float32) / c)
        angles = torch.arange(time, dtype=torch.float32)[:, None, None, None] * theta
        self.register_buffer("cos", angles.cos(), persistent=False)  # [t, 1, 1, c/2]
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def of_config(config: DecoderConfig, time: int) -> TorchDecoder:
    """The architecture of ``config``, with random weights, for rows of ``time`` tokens."""
    attention, mlp = config.part("attention"), config.part("mlp")
    return TorchDecoder(
        vocab=config.vocab_size, width=config.width, layers=config.num_layers,
        heads=attention.num_heads, hidden=mlp.width, time=time, base=config.rotary.base,
        eps=config.norm_eps,
    ).train()  # fmt: skip


def copy(model: Decoder, theirs: TorchDecoder) -> None:
    """Copy ``model``'s weights into ``theirs``; raises RuntimeError unless the parameters match."""
    model = unstacked(model)
    ours = {name: torch.tensor(np.asarray(leaf)) for name, leaf in flat(model).items()}

    def linear(name: str, inputs: int, i: int) -> torch.Tensor:
        # `nn.Linear` is [out, in]; ours of layer i has ``inputs`` input axes, then output axes
        a = ours[f"blocks/{i}/{name}/weight"]
        return a.reshape(math.prod(a.shape[:inputs]), -1).T

    weights = {
        "embedding.weight": ours["embedding/table"],
        "final_norm.weight": ours["final_norm/scale"],
    }
    for i in range(model.config.num_layers):
        qkv = [linear(f"mixer/{name}", 1, i) for name in ("query", "key", "value")]
        gate_up = [linear(f"mlp/{name}", 1, i) for name in ("gate", "up")]
        weights |= {
            f"blocks.{i}.mixer_norm.weight": ours[f"blocks/{i}/mixer_norm/scale"],
            f"blocks.{i}.qkv.weight": torch.cat(qkv),
            f"blocks.{i}.out.weight": linear("mixer/out", 2, i),
            f"blocks.{i}.mlp_norm.weight": ours[f"blocks/{i}/mlp_norm/scale"],
            f"blocks.{i}.gate_up.weight": torch.cat(gate_up),
            f"blocks.{i}.down.weight": linear("mlp/down", 1, i),
        }
    theirs.load_state_dict(weights)
