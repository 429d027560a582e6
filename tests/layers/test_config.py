"""Configuration: one line naming the field, for whatever is wrong."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from layers.architecture import MIXERS
from layers.attention import AttentionConfig
from layers.config import ConfigError, check, check_choice, check_types, from_mapping
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig

GOOD = dict(vocab_size=11, width=8, num_layers=2, attention=dict(num_heads=2), mlp=dict(width=16))


def test_builds_nested_dataclasses_from_mappings_and_config_dicts():
    want = DecoderConfig(11, 8, 2, AttentionConfig(2), MlpConfig(16))
    assert from_mapping(DecoderConfig, GOOD) == want
    assert from_mapping(DecoderConfig, ConfigDict(GOOD)) == want
    assert from_mapping(DecoderConfig, dict(GOOD, attention=AttentionConfig(2))) == want
    assert from_mapping(DecoderConfig, dataclasses.asdict(want)) == want


def test_converts_int_to_float_list_to_tuple_and_none():
    changed = dict(GOOD, norm_eps=1, pattern=["attention", "attention"], logit_cap=None)
    config = from_mapping(DecoderConfig, changed)
    assert config.norm_eps == 1.0 and isinstance(config.norm_eps, float)
    assert config.pattern == ("attention", "attention")
    assert from_mapping(DecoderConfig, dict(GOOD, logit_cap=30)).logit_cap == 30.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widht=8), "model.widht=8: no such field; did you mean 'width'?"),
        (dict(attention=dict(num_heads=2, wndow=4)),
         "model.attention.wndow=4: no such field; did you mean 'window'?"),
        (dict(width="8"), "model.width='8': must be of type int, not str"),
        (dict(width=8.0), "model.width=8.0: must be of type int, not float"),
        (dict(num_layers=True), "model.num_layers=True: must be of type int, not bool"),
        (dict(norm_eps=True), "model.norm_eps=True: must be of type float, not bool"),
        (dict(scan=1), "model.scan=1: must be of type bool, not int"),
        (dict(width=None), "model.width=None: must be of type int, not NoneType"),
        (dict(pattern="attention"), "model.pattern='attention': must be a list"),
        (dict(pattern=["attention", 3]), "model.pattern[1]=3: must be of type str, not int"),
        (dict(attention=4), "model.attention=4: must be a mapping of fields"),
        (dict(attention=dict()), "model.attention.num_heads: required, of type int"),
        (dict(attention=dict(num_heads=2, window=2.5)),
         "model.attention.window=2.5: must be of type int, not float"),
        (dict(width=-8), "model.width=-8: must be > 0"),
        (dict(mlp=dict(width=-1)), "model.mlp.width=-1: must be > 0"),
        (dict(norm_eps=float("nan")), "model.norm_eps=nan: must be a finite number"),
        (dict(norm_eps=1e999), "model.norm_eps=inf: must be a finite number"),
        (dict(norm_eps=10**400), f"model.norm_eps={10**400}: must be a finite number"),
        (dict(width=2**63), f"model.width={2**63}: must be an integer of at most 64 bits"),
        (dict(mlp=object), "model.mlp=<class 'object'>: must be a mapping of fields"),
        (dict(max_length=0), "model.max_length=0: must be > 0 or None"),
        (dict(position="rotry"),
         "model.position='rotry': must be one of rotary, alibi, learned, sinusoidal, none "
         "(did you mean 'rotary'?)"),
        (dict(dtype="float64"), "model.dtype='float64': must be one of float32, bfloat16, float16 "
         "(did you mean 'float16'?)"),
        (dict(pattern=["slidng"]),
         f"model.pattern[0]='slidng': must be one of {', '.join(MIXERS)} "
         "(did you mean 'sliding'?)"),
        (dict(pattern=[]), "model.pattern=(): must name at least one layer"),
        (dict(num_layers=3, pattern=["attention"] * 2),
         "model.num_layers=3: must be a multiple of the pattern's length 2"),
        (dict(pattern=["sliding"]),
         "model.attention.window=None: is required by 'sliding' layers"),
        (dict(attention=dict(num_heads=2, window=4)),
         "model.attention.window=4: requires a 'sliding' layer in pattern"),
        (dict(position="learned"), "model.max_length=None: is required by position='learned'"),
        (dict(position="sinusoidal", width=9, attention=dict(num_heads=3)),
         "model.width=9: must be even with position='sinusoidal'"),
        (dict(norm_bias=True), "model.norm_bias=True: requires norm='layernorm'"),
        (dict(parallel_residual=True, norm_position="post"),
         "model.parallel_residual=True: requires norm_position='pre' or 'both'"),
        (dict(parallel_residual=True, norm_position="output"),
         "model.parallel_residual=True: requires norm_position='pre' or 'both'"),
        (dict(shared_norm=False),
         "model.shared_norm=False: requires parallel_residual=True"),
        (dict(sliding_rotary=dict(scaling=dict(kind="ntk"))),
         "model.sliding_rotary.scaling.kind='ntk': must be one of linear, dynamic, llama3, yarn, "
         "longrope"),
        (dict(attention=dict(num_heads=3)),
         "model.attention.num_heads=3: must divide width=8 without head_dim"),
        (dict(attention=dict(num_heads=8)),
         "model.rotary.fraction=1.0: must rotate an even number ≥ 2 of channels, not 1 of "
         "head_dim=1"),
        ({3: 4}, None),
    ],
)  # fmt: skip
def test_refusals_are_one_line_naming_the_field(changes, message):
    with pytest.raises(ConfigError) as raised:
        from_mapping(DecoderConfig, {**GOOD, **changes}, "model")
    assert "\n" not in str(raised.value)
    if message is not None:
        assert str(raised.value) == message


def test_a_missing_field_and_a_value_that_is_no_mapping():
    with pytest.raises(ConfigError, match="^vocab_size: required, of type int$"):
        from_mapping(DecoderConfig, {k: v for k, v in GOOD.items() if k != "vocab_size"})
    with pytest.raises(ConfigError, match="^DecoderConfig=7: must be a mapping of fields$"):
        from_mapping(DecoderConfig, 7)


def test_a_tuple_of_fixed_length_converts_each_value_to_its_own_type():
    @dataclasses.dataclass(frozen=True)
    class Pairs:
        pairs: tuple[tuple[int, float], ...]

        def __post_init__(self):
            check_types(self)

    assert repr(Pairs([[3, 1]]).pairs) == "((3, 1.0),)"  # type: ignore[arg-type]
    for pairs, message in [
        ([[3, 1, 2]], "pairs[0]=[3, 1, 2]: must hold 2 values"),
        ([[1.0, 3]], "pairs[0][0]=1.0: must be of type int, not float"),
        ([3], "pairs[0]=3: must be a list"),
    ]:
        with pytest.raises(ConfigError) as raised:
            Pairs(pairs)
        assert str(raised.value) == message


def test_a_choice_suggests_a_near_miss_only():
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ConfigError, match="^x='zebra': must be one of a, b$"):
        check_choice("x", "zebra", ("a", "b"))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (DecoderConfig, dict(GOOD, num_layers=2.0),
         "num_layers=2.0: must be of type int, not float"),
        (DecoderConfig, dict(GOOD, num_layers=True),
         "num_layers=True: must be of type int, not bool"),
        (DecoderConfig, dict(GOOD, mlp=100), "mlp=100: must be a mapping of fields"),
        (DecoderConfig, dict(GOOD, mlp=AttentionConfig(2)), "mlp=AttentionConfig"),
        (DecoderConfig, dict(GOOD, pattern="attention"), "pattern='attention': must be a list"),
        (AttentionConfig, dict(num_heads=2, window="4"),
         "window='4': must be of type int, not str"),
        (AttentionConfig, dict(num_heads=2, scale=float("inf")),
         "scale=inf: must be a finite number"),
        (MlpConfig, dict(width=8, bias=1), "bias=1: must be of type bool, not int"),
        (MlpConfig, dict(width=8, activation=None),
         "activation=None: must be of type str, not NoneType"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_built_directly_checks_its_types(cls, fields, message):
    with pytest.raises(ConfigError) as raised:
        cls(**fields)
    assert str(raised.value).startswith(message)


def test_a_configuration_that_is_built_directly_converts_like_a_mapping():
    fields: dict = dict(GOOD, norm_eps=1, pattern=["attention", "attention"])
    config = DecoderConfig(**fields)
    assert config == from_mapping(DecoderConfig, fields)
    assert isinstance(config.norm_eps, float) and isinstance(config.pattern, tuple)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError, match="must be 3 numbers") as caught:
        check(False, "factors", (1.5,) * 9_999, "must be 3 numbers")
    assert len(str(caught.value)) < 1_100
