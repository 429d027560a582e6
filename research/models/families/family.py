"""`Family`, and what several families share: rotary fields, patterns of layers, norm rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from layers.config import check, check_choice
from layers.decoder import DecoderConfig
from layers.rotary import SCALINGS, RotaryConfig, RotaryScaling, yarn_growth
from research.models.table import Row

Kind = TypeVar("Kind")


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
    """

    architecture: str
    model_type: str
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beyond: str | None = None
    absent: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The name of the output layer; a tied checkpoint may have a copy of the embedding."""
        return next(row.name for row in self.rows if row.paths == ("head/weight",))


def supported(hf: Mapping[str, Any], where: str = "", **only: Any) -> None:
    """Raise `ConfigError` unless each field of ``only`` is absent from ``hf`` or has that value."""
    for name, value in only.items():
        actual = hf.get(name, value)
        check(actual == value, where + name, actual, f"must be {_json(value)}")


def _json(value: Any) -> str:
    spelt = {None: "null", True: "true", False: "false"}
    return spelt[value] if value is None or isinstance(value, bool) else str(value)


def head_channels(config: DecoderConfig) -> int:
    """The model's channels per head."""
    return config.part("attention").channels(config.width)


def read_rotary(hf: Mapping[str, Any], **defaults: float) -> RotaryConfig:
    """``rope_parameters`` (transformers ≥ 5), or the older ``rope_theta`` and ``rope_scaling``."""
    rope: dict[str, Any] = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, **defaults}
    rope |= {name: hf[name] for name in rope if name in hf}
    rope |= rope_fields(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_choice("rope_parameters.rope_type", kind, ("default", *SCALINGS))
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling("linear", float(rope["factor"]))
    elif kind == "llama3":
        scaling = RotaryScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            rope["original_max_position_embeddings"],
        )
    elif kind == "yarn":
        supported(rope, "rope_parameters.", truncate=True)
        factor = float(rope["factor"])
        magnitude = rope.get("attention_factor")
        weight, overall = float(rope.get("mscale") or 0), read_mscale(hf)
        if magnitude is None and weight and overall:
            magnitude = yarn_growth(factor, weight) / yarn_growth(factor, overall)
        scaling = RotaryScaling(
            "yarn",
            factor,
            float(rope.get("beta_slow") or 1),
            float(rope.get("beta_fast") or 32),
            rope["original_max_position_embeddings"],
            magnitude,
        )
    return RotaryConfig(
        float(rope["rope_theta"]), float(rope["partial_rotary_factor"]), scaling=scaling
    )


def rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of a config.json; ``rope_parameters`` (newer) override ``rope_scaling``."""
    return {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}


def read_mscale(hf: Mapping[str, Any]) -> float:
    """The weight of YaRN's temperature in the factor of the whole score; 0 if there is none."""
    return float(rope_fields(hf).get("mscale_all_dim") or 0)


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
