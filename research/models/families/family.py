"""`Family`, and what several families share: patterns of layers, norm rows."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from layers.config import check_choice
from layers.decoder import DecoderConfig
from research.models.fields import Fields
from research.models.table import Row

Kind = TypeVar("Kind")
MOST_LAYERS = 10_000  # a list of the layers is made before a tensor is looked at


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family of checkpoints maps to a `Decoder`.

    Attributes:
      architecture, model_type: as in config.json.
      also: other names of the architecture.
      read, write: convert a config.json to a `DecoderConfig` and back.
      rows: one per tensor.
      prefix: part of the rows' names; a checkpoint may lack it.
      ignored: endings of the names of tensors that are not parameters.
      renamed: a tensor's other name in some checkpoints → its name in the rows.
      composite: the type of models that consist of this one and others, such as an encoder of
        images → their architectures. Their config.json has this model's in ``text_config``.
      nested: the beginning of names in a composite model → in the rows.
      skipped: the beginnings of the names of a composite model's other tensors.
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
    also: tuple[str, ...] = ()
    composite: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    nested: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    beyond: str | None = None
    absent: tuple[str, ...] = ()
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Model types → architectures. ``…Model`` is the model without a head."""
        names = (self.architecture, *self.also)
        if not self.composite:
            names += (re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.architecture),)
        return {self.model_type: names, **self.composite}

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
