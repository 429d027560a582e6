"""What a decoder is made of: every choice in one dataclass, checked against one another."""

import dataclasses
from typing import Any

import jax

from layers.attention import AttentionConfig
from layers.config import ConfigError, check, check_choice
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.norm import NORMS
from layers.rotary import RotaryConfig, rotated_channels
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig

POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")
# name → the field of the configuration that it needs
MIXERS = {
    "attention": "attention",
    "sliding": "attention",
    "latent": "latent",
    "mamba": "mamba",
    "mamba2": "mamba",
    "rwkv4": "rwkv",
    "rwkv7": "rwkv",
}
FEED_FORWARDS = {"mlp": "mlp", "rwkv4": "mlp", "rwkv7": "mlp", "moe": "moe", "none": None}
NORM_POSITIONS = ("pre", "post", "both", "output")
# what a block makes that is as wide as the model or its heads, by the names of `layers.hooks`
NARROW = ("attention.query", "attention.key", "attention.value", "mixed", "mlp.output")
_POLICIES = jax.checkpoint_policies
# name → policy of jax.checkpoint; "none" keeps every activation
REMAT = {
    "none": None,
    "full": _POLICIES.nothing_saveable,
    "narrow": _POLICIES.save_only_these_names(*NARROW),
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "full_offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots_offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
OFFLOADED = ("full_offload", "dots_offload")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    ``pattern`` names the mixer of each layer in turn and is repeated to ``num_layers``:
    ``"attention"`` sees everything before, ``"sliding"`` the last ``attention.window`` tokens,
    ``"latent"`` everything before through keys and values of low rank (DeepSeek), ``"mamba"``,
    ``"mamba2"``, ``"rwkv4"`` and ``"rwkv7"`` a state of fixed size. ``feed_forward`` names the
    layer after each mixer, one a pattern entry or one for all: ``"mlp"``, RWKV's channel-mix
    ``"rwkv4"`` and ``"rwkv7"`` (whose hidden size is ``mlp.width`` too), a mixture of experts
    ``"moe"``, or ``"none"``.
    ``norm_position``: ``pre`` (GPT-2, Llama), ``post`` (Vaswani 2017), ``both`` (Gemma 2) or
    ``output``, of what a layer adds to the residual alone (OLMo 2).
    ``parallel_residual``: attention and MLP read the same input, normalised once (GPT-J) or,
    without ``shared_norm``, each by a norm of its own (GPT-NeoX). ``sliding_rotary``: of the
    sliding layers (Gemma 3); None: ``rotary``, as the others.
    ``max_length``: rows of the learned position table; nothing else limits the length.
    ``embedding_norm``: a norm of the embeddings themselves (BLOOM, RWKV).
    ``embedding_scale`` multiplies embeddings; ``logit_cap`` soft-caps logits (Gemma 2).
    ``circuits`` and ``microbatches`` are of a mesh that splits layers over stages
    (`layers.pipeline`): how often a batch goes round the stages, and in how many parts. Parameters
    are stacked a circuit apart; beside that neither changes the model.
    ``remat``: what is kept for the backward pass, the rest being computed again. ``none``: all is
    kept, nothing computed again. ``dots``: every product with a weight; attention, norms and
    activations are computed again. ``narrow``: queries, keys, values and what mixers and MLPs add
    to the residual; the MLP's hidden layer, which is most of ``dots``, is computed again as well.
    ``full``: the input of each repeat of the pattern; every forward is computed twice.
    ``dots_offload``: as ``dots``, kept in the host's memory: no product is computed again, and the
    device has well under what ``dots`` leaves it. ``full_offload``: the input of each layer, in the
    host's memory: the device has the activations of one repeat at a time, for deep models and the
    longest sequences.
    ``dtype`` is what is computed in, ``param_dtype`` what is stored; norms, softmax and logits are
    float32 whatever they are. ``init_std``: of the embeddings; other weights are fan-in scaled, and
    residual outputs by ``1/sqrt(2·num_layers)`` more (GPT-2, §2.3).
    """

    vocab_size: int
    width: int
    num_layers: int
    attention: AttentionConfig | None = None
    mlp: MlpConfig | None = None
    latent: LatentConfig | None = None
    mamba: MambaConfig | None = None
    rwkv: RwkvConfig | None = None
    moe: MoeConfig | None = None
    pattern: tuple[str, ...] = ("attention",)
    feed_forward: tuple[str, ...] = ("mlp",)
    position: str = "rotary"
    rotary: RotaryConfig = RotaryConfig()
    sliding_rotary: RotaryConfig | None = None
    max_length: int | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_position: str = "pre"
    parallel_residual: bool = False
    shared_norm: bool = True
    embedding_norm: bool = False
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    logit_cap: float | None = None
    init_std: float = 0.02
    circuits: int = 1
    microbatches: int | None = None
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "circuits", "norm_eps", "init_std"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("max_length", "embedding_scale", "logit_cap", "microbatches"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        check_choice("position", self.position, POSITIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_position", self.norm_position, NORM_POSITIONS)
        check_choice("remat", self.remat, REMAT)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, DTYPES)
        check(len(self.pattern) > 0, "pattern", self.pattern, "must name at least one layer")
        for i, kind in enumerate(self.pattern):
            check_choice(f"pattern[{i}]", kind, MIXERS)
        check(
            self.num_layers % len(self.pattern) == 0,
            "num_layers",
            self.num_layers,
            f"must be a multiple of the pattern's length {len(self.pattern)}",
        )
        check(
            self.repeats % self.circuits == 0,
            "circuits",
            self.circuits,
            f"must divide the pattern's {self.repeats} repeats",
        )
        check(
            len(self.feed_forward) in (1, len(self.pattern)),
            "feed_forward",
            self.feed_forward,
            f"must name one layer, or one for each of pattern's {len(self.pattern)}",
        )
        for i, kind in enumerate(self.feed_forward):
            check_choice(f"feed_forward[{i}]", kind, FEED_FORWARDS)
        needed = {MIXERS[kind]: kind for kind in self.pattern}
        needed |= {FEED_FORWARDS[kind]: kind for kind in self.feed_forward}
        for name, kind in needed.items():
            given = name is None or getattr(self, name) is not None
            check(given, str(name), None, f"the {kind!r} layers need it")
        check(
            self.position != "learned" or self.max_length is not None,
            "max_length",
            None,
            "learned positions need it",
        )
        check(
            self.position != "sinusoidal" or self.width % 2 == 0,
            "width",
            self.width,
            "sinusoidal positions need an even one",
        )
        check(
            not self.norm_bias or self.norm == "layernorm",
            "norm_bias",
            self.norm_bias,
            "only layernorm has one",
        )
        check(
            not self.parallel_residual or self.norm_position in ("pre", "both"),
            "parallel_residual",
            True,
            "needs norm_position=pre or both",
        )
        check(
            self.shared_norm or self.parallel_residual,
            "shared_norm",
            False,
            "only with parallel_residual is there a norm to share",
        )
        check(
            self.sliding_rotary is None or "sliding" in self.pattern,
            "sliding_rotary",
            self.sliding_rotary,
            "no layer of pattern is sliding",
        )
        check(
            "latent" not in self.pattern or self.position == "rotary",
            "position",
            self.position,
            "must be rotary: latent attention knows no other",
        )
        if self.attention is not None:
            self._check_attention(self.attention)
        if self.mamba is not None and "mamba2" in self.pattern:
            try:
                self.mamba.heads(self.width)
            except ConfigError as error:
                raise ConfigError(f"mamba.{error}") from None

    def _check_attention(self, attention: AttentionConfig) -> None:
        window, sliding = attention.window, "sliding" in self.pattern
        check(
            sliding == (window is not None),
            "attention.window",
            window,
            "the pattern's sliding layers need it" if sliding else "no layer of pattern is sliding",
        )
        try:
            channels = attention.channels(self.width)
        except ConfigError as error:
            raise ConfigError(f"attention.{error}") from None
        if self.position == "rotary":
            rotated_channels(channels, self.rotary.fraction)
            if self.sliding_rotary is not None:
                rotated_channels(channels, self.sliding_rotary.fraction)

    def part(self, name: str) -> Any:
        """The configuration of ``attention``, ``mlp``, …; `ConfigError` if the model has none."""
        found = getattr(self, name)
        check(found is not None, name, None, "this model has none")
        return found

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """The pattern's (mixer, feed-forward) pairs."""
        each = self.feed_forward * (len(self.pattern) // len(self.feed_forward))
        return tuple(zip(self.pattern, each, strict=True))

    @property
    def repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    def place(self, layer: int) -> tuple[int, int]:
        """Which of a decoder's ``blocks`` holds ``layer``, and where in its stack."""
        repeat, p = divmod(layer, len(self.pattern))
        circuit, index = divmod(repeat, self.repeats // self.circuits)
        return circuit * len(self.pattern) + p, index
