"""What a decoder is made of: every choice in one dataclass, checked against one another."""

import dataclasses
from typing import Any

import jax

from layers.attention import AttentionConfig
from layers.config import EXECUTION, PRECISION, TRAINING, ConfigError, check, check_choice
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
NARROW = (
    "attention.query", "attention.key", "attention.value", "mixer.output", "mlp.output",
)  # fmt: skip
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
    """A decoder-only language model: what it computes, and how.

    Norms, softmax and logits are float32 whatever ``dtype`` is. Weights are initialised by their
    fan-in, residual outputs by ``1/sqrt(2·num_layers)`` more (GPT-2, §2.3).
    """

    vocab_size: int
    width: int
    num_layers: int
    # The parts that layers of the pattern are made of; None where no layer needs them.
    attention: AttentionConfig | None = None
    mlp: MlpConfig | None = None  # its width is also the hidden size of RWKV's channel-mix
    latent: LatentConfig | None = None
    mamba: MambaConfig | None = None
    rwkv: RwkvConfig | None = None
    moe: MoeConfig | None = None
    # The sequence mixer of each layer in turn (`MIXERS`), repeated to num_layers: "attention" sees
    # everything before, "sliding" the last attention.window tokens, "latent" everything before
    # through keys and values of low rank (DeepSeek); the others a state of fixed size.
    pattern: tuple[str, ...] = ("attention",)
    # The layer after each mixer (`FEED_FORWARDS`): one for each of the pattern, or one for all.
    feed_forward: tuple[str, ...] = ("mlp",)
    # How positions enter (`POSITIONS`): "rotary" and "alibi" in attention, the others once, added
    # to the embeddings.
    position: str = "rotary"
    rotary: RotaryConfig = RotaryConfig()
    # Of sliding layers (Gemma 3); None: as the others.
    sliding_rotary: RotaryConfig | None = None
    # Rows of the learned position table; nothing else limits the length.
    max_length: int | None = None
    norm: str = "rmsnorm"  # of `NORMS`
    norm_eps: float = 1e-6
    norm_bias: bool = False
    # "pre" (GPT-2, Llama), "post" (Vaswani 2017), "both" (Gemma 2), or "output", of what a layer
    # adds to the residual (OLMo 2).
    norm_position: str = "pre"
    # Mixer and feed-forward layer read the same input and are added together (GPT-J, GPT-NeoX) …
    parallel_residual: bool = False
    # … normalised once for both (GPT-J), or by a norm each (GPT-NeoX).
    shared_norm: bool = True
    # A norm of the embeddings themselves (BLOOM, RWKV).
    embedding_norm: bool = False
    # Logits are products with the embedding table; False: with a head of their own.
    tie_embeddings: bool = True
    # Numbers that the head gives for each token in place of logits: 1 for a reward or value model.
    outputs: int | None = None
    # Multiplies embeddings (Gemma).
    embedding_scale: float | None = None
    # cap · tanh(logit / cap) of logits (Gemma 2).
    logit_cap: float | None = None
    # Standard deviation of initial embeddings.
    init_std: float = dataclasses.field(default=0.02, metadata=TRAINING)
    # How often a batch goes round the stages of a pipeline (`layers.pipeline`) …
    circuits: int = dataclasses.field(default=1, metadata=EXECUTION)
    # … and in how many parts; None without stages.
    microbatches: int | None = dataclasses.field(default=None, metadata=EXECUTION)
    # True: layers are stacked and scanned, one body is compiled. False: a list of layers, each
    # compiled; faster on CPUs and in decoding.
    scan: bool = dataclasses.field(default=True, metadata=EXECUTION)
    # What is kept for the backward pass; the rest is computed again. "none": all is kept. "dots":
    # every product with a weight; attention, norms and activations are computed again. "narrow":
    # queries, keys, values and what mixers and MLPs add to the residual; the MLP's hidden layer,
    # most of "dots", is computed again too. "full": the input of each repeat of the pattern.
    # "dots_offload" and "full_offload" keep theirs in the host's memory.
    remat: str = dataclasses.field(default="none", metadata=EXECUTION)
    dtype: str = dataclasses.field(default="float32", metadata=PRECISION)  # of computation
    param_dtype: str = dataclasses.field(default="float32", metadata=PRECISION)  # of storage

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "circuits", "norm_eps", "init_std"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("max_length", "embedding_scale", "logit_cap", "microbatches", "outputs"):
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
        check(self.scan or self.circuits == 1, "circuits", self.circuits, "must be 1: scan=False")
        if self.outputs is not None:
            check(not self.tie_embeddings, "tie_embeddings", True, "must be False with outputs")
            check(self.logit_cap is None, "logit_cap", self.logit_cap, "must be None with outputs")
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
            "must be rotary: latent attention has no other",
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

    def locate(self, layer: int) -> tuple[int, int | None]:
        """Which of a decoder's ``blocks`` holds ``layer``, and its row if blocks are stacked."""
        if not self.scan:
            return layer, None
        repeat, p = divmod(layer, len(self.pattern))
        circuit, row = divmod(repeat, self.repeats // self.circuits)
        return circuit * len(self.pattern) + p, row
