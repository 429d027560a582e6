"""`Family`, and what several families share: rotary fields, patterns of layers, norm rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from layers.config import check_choice
from layers.decoder import DecoderConfig
from layers.rotary import SCALINGS, RotaryConfig, RotaryScaling, yarn_growth
from research.models.fields import REQUIRED, Fields
from research.models.table import Row

Kind = TypeVar("Kind")
MOST_LAYERS = 10_000  # a list of the layers is made before a tensor is looked at


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family of checkpoints maps to a `Decoder`.

    Attributes:
      architecture, model_type: as in config.json.
      read, write: convert a config.json to a `DecoderConfig` and back.
      rows: one per tensor.
      prefix: part of the rows' names; a checkpoint may lack it.
      ignored: endings of the names of tensors that are not parameters.
      renamed: a tensor's other name in some checkpoints → its name in the rows.
      beyond: the beginning of a layer's names, up to its number. Layers after the last are not
        loaded (DeepSeek's predict further tokens).
      absent: tensors that are not used and that a checkpoint may lack; a missing one becomes 0.
      unused: fields of config.json that `read` does not read → why they change nothing, besides
        those of `research.models.families.unused.EVERYWHERE`.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beyond: str | None = None
    absent: tuple[str, ...] = ()
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def head(self) -> str:
        """The name of the output layer; a tied checkpoint may have a copy of the embedding."""
        return next(row.name for row in self.rows if row.paths == ("head/weight",))

    @property
    def embedding(self) -> str:
        """The name of the embedding."""
        return next(row.name for row in self.rows if row.paths == ("embedding/table",))


def head_channels(config: DecoderConfig) -> int:
    """The model's channels per head."""
    return config.part("attention").channels(config.width)


def read_layers(fields: Fields, name: str = "num_hidden_layers") -> int:
    """The number of layers."""
    return fields.integer(name, at_most=MOST_LAYERS)


def read_rotary(
    fields: Fields,
    rope: Fields | None = None,
    *,
    theta: float = 10_000.0,
    theta_name: str = "rope_theta",
    fraction_name: str = "partial_rotary_factor",
    fraction: float | None = None,
    kinds: Sequence[str] = ("default", *SCALINGS),
) -> RotaryConfig:
    """The rotation that ``rope`` describes; default: `rope_fields`.

    Args:
      fields: of the whole file; older files have some of rope's fields there.
      theta, fraction: defaults. ``fraction=None``: all channels rotate, and another fraction is
        refused: transformers would ignore it.
      theta_name, fraction_name: names of these two in older files.
      kinds: allowed values of ``rope_type``.
    """
    rope = rope_fields(fields) if rope is None else rope
    base = _older(fields, rope, theta_name, "rope_theta", theta, above=1)
    if fraction is None:
        fields.only(partial_rotary_factor=1.0)
        rope.only(partial_rotary_factor=1.0)
    share = _older(
        fields, rope, fraction_name, "partial_rotary_factor", fraction or 1.0, above=0
    )  # fmt: skip
    rope.same("type", "rope_type")
    kind = rope.text("rope_type" if "rope_type" in rope else "type", "default", choices=kinds)
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling("linear", rope.number("factor", above=0))
    elif kind == "llama3":
        scaling = RotaryScaling(
            "llama3",
            rope.number("factor", above=0),
            rope.number("low_freq_factor", above=0),
            rope.number("high_freq_factor", above=0),
            _original_length(fields, rope),
        )
    elif kind == "yarn":
        rope.only(truncate=True)
        factor = rope.number("factor", above=0)
        magnitude = rope.number("attention_factor", None, above=0)
        weight, overall = rope.number("mscale", 0.0, null=0.0, at_least=0), read_mscale(rope)
        if magnitude is None and weight and overall:
            magnitude = yarn_growth(factor, weight) / yarn_growth(factor, overall)
        scaling = RotaryScaling(
            "yarn",
            factor,
            rope.number("beta_slow", 1.0, null=1.0, above=0),
            rope.number("beta_fast", 32.0, null=32.0, above=0),
            _original_length(fields, rope),
            magnitude,
        )
    return RotaryConfig(base, share, scaling=scaling)


def _older(
    fields: Fields, rope: Fields, older: str, newer: str, default: float, *, above: float
) -> float:
    """``rope``'s field ``newer``, or ``older`` of the file; both must agree if both are given."""
    outside = fields.number(older, default, above=above)
    inside = rope.number(newer, outside, above=above)
    if older in fields and inside != outside:
        fields.refuse(older, outside, f"must be that of {newer} in rope_parameters, {inside}")
    return inside


def _original_length(fields: Fields, rope: Fields) -> int:
    length = fields.integer("max_position_embeddings", None)
    return rope.integer("original_max_position_embeddings", REQUIRED if length is None else length)


def rope_fields(fields: Fields, newer: Fields | None = None) -> Fields:
    """The rotary fields: ``newer`` (``rope_parameters``, transformers ≥ 5) or ``rope_scaling``.

    Of both, transformers reads the older one; a file in which they differ is refused.
    """
    newer = fields.object("rope_parameters") if newer is None else newer
    older = fields.object("rope_scaling")
    if not newer:
        return older
    if older:
        if older.values != newer.values:
            fields.refuse("rope_scaling", older.values, "must be equal to rope_parameters")
        older.read_all()
    return newer


def read_mscale(rope: Fields) -> float:
    """The weight of YaRN's temperature in the factor of the whole score; 0 if there is none."""
    return rope.number("mscale_all_dim", 0.0, null=0.0, at_least=0)


def rope_parameters(rotary: RotaryConfig) -> dict[str, Any]:
    """``rotary`` as ``rope_parameters`` of transformers ≥ 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if rotary.fraction != 1:
        rope["partial_rotary_factor"] = rotary.fraction
    if (scaling := rotary.scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_turns
            rope["high_freq_factor"] = scaling.high_turns
            rope["original_max_position_embeddings"] = scaling.original_length
        if scaling.kind == "yarn":
            rope |= {"beta_slow": scaling.low_turns, "beta_fast": scaling.high_turns}
            rope["original_max_position_embeddings"] = scaling.original_length
            if scaling.magnitude is not None:
                rope["attention_factor"] = scaling.magnitude
    return rope


def write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    """``rotary`` in the newer fields, and in the older ones for libraries that read only these."""
    rope = rope_parameters(rotary)
    written = {"rope_parameters": rope, "rope_theta": rotary.base}
    if rotary.fraction != 1:
        written["partial_rotary_factor"] = rotary.fraction
    return written | ({"rope_scaling": rope} if rotary.scaling is not None else {})


# layer type in config.json → mixer of the Decoder
_LAYER_TYPES = {"full_attention": "attention", "sliding_attention": "sliding"}


def read_pattern(layer_types: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives ``layer_types``."""
    for i, kind in enumerate(layer_types):
        check_choice(f"layer_types[{i}]", kind, _LAYER_TYPES)
    return shortest(tuple(_LAYER_TYPES[kind] for kind in layer_types))


def shortest(layers: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The shortest tuple whose repetition gives ``layers``."""
    count = len(layers)
    return next(
        layers[:n]
        for n in range(1, count + 1)
        if count % n == 0 and layers[:n] * (count // n) == layers
    )


def layer_types(config: DecoderConfig) -> list[str]:
    """The type of each layer, as config.json lists them."""
    type_of_mixer = {mixer: name for name, mixer in _LAYER_TYPES.items()}
    for i, kind in enumerate(config.pattern):
        check_choice(f"pattern[{i}]", kind, type_of_mixer)
    return [type_of_mixer[kind] for kind in config.pattern * config.repeats]


def parts(prefix: str, part: str, *names: str) -> tuple[str, ...]:
    """The paths of the parts of a fused tensor, e.g. of query, key and value."""
    return tuple(f"{prefix}/{name}/{part}" for name in names)


def affine(name: str, path: str) -> tuple[Row, Row]:
    """The rows of a norm's scale and bias."""
    return (
        Row(f"{name}.weight", "d -> d", (f"{path}/scale",)),
        Row(f"{name}.bias", "d -> d", (f"{path}/bias",)),
    )
