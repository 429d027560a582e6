"""The rotary fields of config.json, in both of their spellings, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from layers.config import check
from layers.decoder import DecoderConfig
from layers.rotary import BY_LENGTH, SCALINGS, RotaryConfig, RotaryScaling, yarn_growth
from research.models.fields import REQUIRED, Fields, is_finite

# the name of LongRoPE in older files
_SU = "su"
KINDS = ("default", *SCALINGS, _SU)
_ORIGINAL, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"


def read_rotary(
    fields: Fields,
    rope: Fields | None = None,
    *,
    theta: float = 10_000.0,
    theta_name: str = "rope_theta",
    fraction_name: str = "partial_rotary_factor",
    fraction: float | None = None,
    kinds: Sequence[str] = KINDS,
    original_length: int | None = None,
) -> RotaryConfig:
    """The rotation that ``rope`` describes; default: `rope_fields`.

    The frequencies of ``longrope`` are those for sequences of ``max_position_embeddings``, and of
    ``dynamic`` those of training; `with_context` chooses another length.

    Args:
      fields: of the whole file; older files have some of rope's fields there.
      theta, fraction: defaults. ``fraction=None``: all channels rotate, and another fraction is
        refused: transformers would ignore it.
      theta_name, fraction_name: names of these two in older files.
      kinds: allowed values of ``rope_type``.
      original_length: the default of ``original_max_position_embeddings`` outside of ``rope``; it
        precedes the one inside, as in transformers.
    """
    rope = rope_fields(fields) if rope is None else rope
    base = _older(fields, rope, theta_name, "rope_theta", theta, above=1)
    if fraction is None:
        fields.only(partial_rotary_factor=1.0)
        rope.only(partial_rotary_factor=1.0)
    share = _older(fields, rope, fraction_name, "partial_rotary_factor", fraction or 1.0, above=0)
    rope.same("type", "rope_type")
    kind = rope.text("rope_type" if "rope_type" in rope else "type", "default", choices=kinds)
    scaling = _read_scaling(fields, rope, kind, original_length)
    return RotaryConfig(base, share, scaling=scaling)


def _read_scaling(
    fields: Fields, rope: Fields, kind: str, original_length: int | None
) -> RotaryScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling("linear", rope.number("factor", above=0))
    if kind == "dynamic":
        longest = fields.integer(_LONGEST)
        return RotaryScaling("dynamic", rope.number("factor", at_least=1), original_length=longest)
    original = _original_length(fields, rope, original_length)
    if kind == "llama3":
        return RotaryScaling(
            "llama3",
            rope.number("factor", above=0),
            rope.number("low_freq_factor", above=0),
            rope.number("high_freq_factor", above=0),
            original,
        )
    # null means the quotient of the two lengths
    longest = fields.integer(_LONGEST, None)
    quotient = REQUIRED if longest is None else longest / original
    magnitude = rope.number("attention_factor", None, above=0)
    if kind in ("longrope", _SU):
        return RotaryScaling(
            "longrope",
            rope.number("factor", quotient, null=quotient, above=0),
            original_length=original,
            magnitude=magnitude,
            length=fields.integer(_LONGEST),
            short_factors=_factors(rope, "short_factor"),
            long_factors=_factors(rope, "long_factor"),
        )
    factor = rope.number("factor", null=quotient, above=0)
    weight, overall = rope.number("mscale", 0.0, null=0.0, at_least=0), read_mscale(rope)
    if magnitude is None and weight and overall:
        magnitude = yarn_growth(factor, weight) / yarn_growth(factor, overall)
    return RotaryScaling(
        "yarn",
        factor,
        rope.number("beta_slow", 1.0, null=1.0, above=0),
        rope.number("beta_fast", 32.0, null=32.0, above=0),
        original,
        magnitude,
        rope.flag("truncate", True),
    )


def _older(
    fields: Fields, rope: Fields, older: str, newer: str, default: float, *, above: float
) -> float:
    """``rope``'s field ``newer``, or ``older`` of the file; both must agree if both are given."""
    outside = fields.number(older, default, above=above)
    inside = rope.number(newer, outside, above=above)
    if older in fields and inside != outside:
        fields.refuse(older, outside, f"must be that of {newer} in rope_parameters, {inside}")
    return inside


def _original_length(fields: Fields, rope: Fields, default: int | None) -> int:
    """The length in training; both places must agree, and ``max_position_embeddings`` is last."""
    outside = fields.integer(_ORIGINAL, default, null=default)
    longest = fields.integer(_LONGEST, None)
    fallback = longest if outside is None else outside
    inside = rope.integer(_ORIGINAL, REQUIRED if fallback is None else fallback)
    if outside is not None and inside != outside:
        rope.refuse(_ORIGINAL, inside, f"must be {outside}, that outside of rope_parameters")
    return inside


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    values = rope.items(name)
    for i, value in enumerate(values):
        if not (is_finite(value) and value > 0):
            rope.refuse(f"{name}[{i}]", value, "must be a finite number > 0")
    return tuple(float(value) for value in values)


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
    if (scaling := rotary.scaling) is None:
        return rope
    rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        rope[_ORIGINAL] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.low_turns, "beta_fast": scaling.high_turns}
        if not scaling.truncate:
            rope["truncate"] = False
    if scaling.kind == "longrope":
        rope["short_factor"] = list(scaling.short_factors)
        rope["long_factor"] = list(scaling.long_factors)
    if scaling.kind in ("yarn", "longrope") and scaling.magnitude is not None:
        rope["attention_factor"] = scaling.magnitude
    return rope


def write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    """``rotary`` in the newer fields, and in the older ones for libraries that read only these."""
    rope = rope_parameters(rotary)
    written = {"rope_parameters": rope, "rope_theta": rotary.base}
    if rotary.fraction != 1:
        written["partial_rotary_factor"] = rotary.fraction
    if (scaling := rotary.scaling) is None:
        return written
    if scaling.kind == "longrope":
        written[_ORIGINAL] = scaling.original_length
    return written | {"rope_scaling": rope}


def with_context(config: DecoderConfig, length: int) -> DecoderConfig:
    """``config`` with the rotations for sequences of ``length`` tokens.

    Raises:
      ConfigError: no rotation of the model depends on the length.
    """
    whole = isinstance(length, int) and not isinstance(length, bool)
    check(whole and length > 0, "context", length, "must be an integer > 0")
    changed = {}
    for name in ("rotary", "sliding_rotary"):
        rotary: RotaryConfig | None = getattr(config, name)
        if rotary is not None and rotary.scaling is not None and rotary.scaling.kind in BY_LENGTH:
            scaling = dataclasses.replace(rotary.scaling, length=length)
            changed[name] = dataclasses.replace(rotary, scaling=scaling)
    kinds = " or ".join(BY_LENGTH)
    check(bool(changed), "context", length, f"requires a model with a rope_type of {kinds}")
    return dataclasses.replace(config, **changed)
