"""The configuration of a decoder: all choices in one dataclass, which checks them together."""

import dataclasses
from typing import Any

import jax

from layers.attention import AttentionConfig
from layers.config import (
    EXECUTION,
    PRECISION,
    TRAINING,
    ConfigError,
    check,
    check_choice,
    check_types,
)
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.norm import NORMS
from layers.rotary import RotaryConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig

POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")
# name → the field of `DecoderConfig` that it requires
MIXERS = {
    "attention": "attention",
    "sliding": "attention",
    "latent": "latent",
    "mamba": "mamba",
    "mamba2": "mamba",
    "rwkv4": "rwkv",
    "rwkv7": "rwkv",
}
CACHED = ("attention", "sliding", "latent")  # the mixers that store keys
FEED_FORWARDS = {"mlp": "mlp", "rwkv4": "mlp", "rwkv7": "mlp", "moe": "moe", "none": None}
NORM_POSITIONS = ("pre", "post", "both", "output")
# the taps (`layers.hooks`) in a block whose activations are as wide as the model or its heads
NARROW = (
    "attention.query", "attention.key", "attention.value", "mixer.output", "mlp.output",
)  # fmt: skip
_POLICIES = jax.checkpoint_policies
# name → policy of jax.checkpoint; "none" stores every activation
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
    """The configuration of a decoder-only language model.

    Norms, softmax and logits are float32 for every ``dtype``. Weights are initialised by their
    fan-in; the projections that add to the residual also by ``1/sqrt(2·num_layers)`` (GPT-2, §2.3).
    """

    vocab_size: int
    width: int
    num_layers: int
    # The configurations of mixers and feed-forward layers; None if no layer requires it.
    attention: AttentionConfig | None = None
    mlp: MlpConfig | None = None  # its width is also the hidden size of RWKV's channel-mix
    latent: LatentConfig | None = None
    mamba: MambaConfig | None = None
    rwkv: RwkvConfig | None = None
    moe: MoeConfig | None = None
    # The mixers of consecutive layers (`MIXERS`), repeated up to num_layers. "attention" sees all
    # earlier tokens, "sliding" the last attention.window tokens, "latent" all earlier tokens
    # through keys and values of low rank (DeepSeek). The others have a state of fixed size.
    pattern: tuple[str, ...] = ("attention",)
    # The feed-forward layers (`FEED_FORWARDS`): one for each mixer of pattern, or one for all.
    feed_forward: tuple[str, ...] = ("mlp",)
    # How positions are encoded (`POSITIONS`): "rotary" and "alibi" in attention, "learned" and
    # "sinusoidal" by a sum with the embeddings.
    position: str = "rotary"
    rotary: RotaryConfig = RotaryConfig()
    # The rotation of sliding layers (Gemma 3); None: `rotary`.
    sliding_rotary: RotaryConfig | None = None
    # The number of learned positions; other encodings do not limit the length.
    max_length: int | None = None
    norm: str = "rmsnorm"  # of `NORMS`
    norm_eps: float = 1e-6
    # Of the norm after the last layer (RWKV-4); None: norm_eps.
    final_norm_eps: float | None = None
    norm_bias: bool = False
    # "pre" (GPT-2, Llama), "post" (Vaswani 2017), "both" (Gemma 2), or "output": the norm of what
    # a layer adds to the residual (OLMo 2).
    norm_position: str = "pre"
    # True: mixer and feed-forward layer have the same input, and both outputs are added to it
    # (GPT-J, GPT-NeoX).
    parallel_residual: bool = False
    # With parallel_residual. True: one norm for both (GPT-J). False: one norm each (GPT-NeoX).
    shared_norm: bool = True
    # True: embeddings are normalised (BLOOM, RWKV).
    embedding_norm: bool = False
    # True: logits are products with the embedding table. False: with a separate head.
    tie_embeddings: bool = True
    # The number of outputs of the head for each token, instead of logits: 1 for a reward or value
    # model.
    outputs: int | None = None
    # Multiplies embeddings (Gemma).
    embedding_scale: float | None = None
    # Multiplies logits, before logit_cap (MPT).
    logit_scale: float | None = None
    # cap · tanh(logit / cap) of logits (Gemma 2).
    logit_cap: float | None = None
    # Standard deviation of initial embeddings.
    init_std: float = dataclasses.field(default=0.02, metadata=TRAINING)
    # The number of circuits of a pipeline (`layers.pipeline`).
    circuits: int = dataclasses.field(default=1, metadata=EXECUTION)
    # The number of micro-batches of a pipeline; None without stages.
    microbatches: int | None = dataclasses.field(default=None, metadata=EXECUTION)
    # True: layers are stacked and scanned; one body is compiled. False: layers are a list; each is
    # compiled, which is faster on CPUs and in decoding.
    scan: bool = dataclasses.field(default=True, metadata=EXECUTION)
    # What is stored for the backward pass; everything else is recomputed. "none": all activations.
    # "dots": every product with a weight; attention, norms and activation functions are
    # recomputed. "narrow": queries, keys, values and what mixers and MLPs add to the residual; the
    # MLP's hidden units, the largest part of "dots", are recomputed too. "full": the input of each
    # repeat of the pattern. "dots_offload" and "full_offload" store in the host's memory.
    remat: str = dataclasses.field(default="none", metadata=EXECUTION)
    dtype: str = dataclasses.field(default="float32", metadata=PRECISION)  # of computation
    param_dtype: str = dataclasses.field(default="float32", metadata=PRECISION)  # of storage

    def __post_init__(self):
        check_types(self)
        for name in ("vocab_size", "width", "num_layers", "circuits", "norm_eps", "init_std"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        for name in ("max_length", "embedding_scale", "final_norm_eps", "logit_scale", "logit_cap",
                     "microbatches", "outputs"):  # fmt: skip
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
            self.scan or self.circuits == 1, "circuits", self.circuits, "must be 1 with scan=False"
        )
        if self.outputs is not None:
            check(not self.tie_embeddings, "tie_embeddings", True, "must be False with outputs")
            for name in ("logit_cap", "logit_scale"):
                value = getattr(self, name)
                check(value is None, name, value, "must be None with outputs")
        post = self.norm_position == "post"
        check(
            self.final_norm_eps is None or not post,
            "final_norm_eps",
            self.final_norm_eps,
            "requires a norm_position other than 'post': there is no norm after the last layer",
        )
        check(
            len(self.feed_forward) in (1, len(self.pattern)),
            "feed_forward",
            self.feed_forward,
            f"must name one layer, or one for each of pattern's {len(self.pattern)}",
        )
        for i, kind in enumerate(self.feed_forward):
            check_choice(f"feed_forward[{i}]", kind, FEED_FORWARDS)
        required = {MIXERS[kind]: kind for kind in self.pattern}
        required |= {FEED_FORWARDS[kind]: kind for kind in self.feed_forward}
        for name, kind in required.items():
            present = name is None or getattr(self, name) is not None
            check(present, str(name), None, f"is required by {kind!r} layers")
        check(
            self.position != "learned" or self.max_length is not None,
            "max_length",
            None,
            "is required by position='learned'",
        )
        check(
            self.position != "sinusoidal" or self.width % 2 == 0,
            "width",
            self.width,
            "must be even with position='sinusoidal'",
        )
        check(
            not self.norm_bias or self.norm == "layernorm",
            "norm_bias",
            self.norm_bias,
            "requires norm='layernorm'",
        )
        check(
            not self.parallel_residual or self.norm_position in ("pre", "both"),
            "parallel_residual",
            True,
            "requires norm_position='pre' or 'both'",
        )
        check(
            self.shared_norm or self.parallel_residual,
            "shared_norm",
            False,
            "requires parallel_residual=True",
        )
        check(
            self.sliding_rotary is None or "sliding" in self.pattern,
            "sliding_rotary",
            self.sliding_rotary,
            "requires a 'sliding' layer in pattern",
        )
        check(
            "latent" not in self.pattern or self.position == "rotary",
            "position",
            self.position,
            "must be 'rotary' with 'latent' layers",
        )
        if self.attention is not None:
            self._check_attention(self.attention)
        for name, kind, value in (
            ("mamba.delta_least", "mamba2", self.mamba and (self.mamba.delta_least or None)),
            ("mamba.delta_most", "mamba2", self.mamba and self.mamba.delta_most),
            ("rwkv.channels", "rwkv4", self.rwkv and self.rwkv.channels),
            ("rwkv.rescale_every", "rwkv4", self.rwkv and (self.rwkv.rescale_every or None)),
        ):
            check(value is None or kind in self.pattern, name, value, f"requires a {kind!r} layer")
        if self.rwkv is not None and self.rwkv.rescale_every:
            alone = set(self.pattern) == {"rwkv4"} and self.norm_position == "pre"
            every = self.rwkv.rescale_every
            check(alone, "rwkv.rescale_every", every, "requires rwkv4 layers alone, with pre-norms")
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
            "is required by 'sliding' layers"
            if sliding
            else "requires a 'sliding' layer in pattern",
        )
        try:
            channels = attention.channels(self.width)
        except ConfigError as error:
            raise ConfigError(f"attention.{error}") from None
        check(
            self.position == "alibi" or attention.alibi_largest == 8,
            "attention.alibi_largest",
            attention.alibi_largest,
            "requires position='alibi'",
        )
        if self.position == "rotary":
            self.rotary.check_channels(channels)
            if self.sliding_rotary is not None:
                self.sliding_rotary.check_channels(channels)

    def part(self, name: str) -> Any:
        """The field ``name`` (``attention``, ``mlp``, …); raises `ConfigError` if it is None."""
        value = getattr(self, name)
        check(value is not None, name, None, "this model has none")
        return value

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """The pattern's (mixer, feed-forward) pairs."""
        feed_forward = self.feed_forward * (len(self.pattern) // len(self.feed_forward))
        return tuple(zip(self.pattern, feed_forward, strict=True))

    @property
    def repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    def locate(self, layer: int) -> tuple[int, int | None]:
        """The index of ``layer`` in ``Decoder.blocks``, and its row if blocks are stacked."""
        if not self.scan:
            return layer, None
        repeat, p = divmod(layer, len(self.pattern))
        circuit, row = divmod(repeat, self.repeats // self.circuits)
        return circuit * len(self.pattern) + p, row
