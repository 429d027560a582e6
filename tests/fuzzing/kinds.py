"""The kinds of files that are fuzzed: valid files of each, and how this project reads one."""

import atexit
import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers

from layers.config import ConfigError
from layers.decoder import Decoder
from research.ablation.language_model import eval_losses, train_losses
from research.ablation.report import build, results_folder
from research.ablation.results import NotRun, Results
from research.ablation.runner import read_result
from research.data import train_bpe
from research.data.tokenizers import load_tokenizer
from research.inference.compiled import make_stamp
from research.inference.compiled.stamp import EXECUTABLE, PORTABLE, STAMP, read_stamp
from research.models import FAMILIES, decoder_config, save
from research.models.families import family_of
from research.models.fields import Fields
from research.models.fp8 import read_block
from research.models.headers import canonical_names, check_headers, check_sizes
from research.models.load import match, read_object
from research.models.reader import WEIGHTS, Reader
from research.models.table import from_theirs
from tests.fuzzing.mutate import Codec, of_json, of_lines, of_safetensors

SINGLE = WEIGHTS[0]
INDEX = f"{SINGLE}.index.json"
SIZES = dict(
    vocab_size=11, hidden_size=12, n_embd=12, d_model=12, n_layer=2, n_layers=2, n_head=2,
    n_heads=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=24, n_positions=8, n_routed_experts=4, moe_intermediate_size=4,
    num_experts_per_tok=2, num_local_experts=3, kv_lora_rank=4, q_lora_rank=3, qk_nope_head_dim=4,
    qk_rope_head_dim=6, v_head_dim=4, n_group=1, topk_group=1, n_groups=2, num_heads=4, head_dim=6,
    first_k_dense_replace=1, sliding_window=5, state_size=3, decay_rank=2, rate_rank=2,
    value_rank=2, gate_rank=2, tie_word_embeddings=False, max_position_embeddings=32,
    rotary_pct=1.0,
)  # fmt: skip
_YARN = dict(
    rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=8, beta_fast=32,
    beta_slow=1, mscale=1.0, mscale_all_dim=0.7, attention_factor=1.0, truncate=True,
)  # fmt: skip
_FP8 = dict(
    quant_method="fp8", fmt="e4m3", weight_block_size=[4, 4], activation_scheme="dynamic"
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", factor=8.0, rope_theta=1e4, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8,
)  # fmt: skip
# further fields that a family reads, in a second valid config.json
_MORE: dict[str, dict[str, Any]] = {
    "llama": dict(rope_parameters=_LLAMA3, rope_theta=1e4),
    "qwen3": dict(rope_scaling=_YARN, rope_parameters=None, use_sliding_window=True),
    "deepseek_v3": dict(
        rope_scaling=_YARN, rope_parameters=_YARN, aux_loss_alpha=0.1, quantization_config=_FP8
    ),
    "phi3": dict(
        original_max_position_embeddings=8,
        rope_scaling=dict(type="longrope", short_factor=[1, 1.5, 2], long_factor=[2, 3.5, 8]),
        rope_parameters=None,
    ),
    "gemma3_text": dict(
        rope_parameters=dict(
            full_attention=dict(_YARN, rope_theta=1e6), sliding_attention=dict(rope_theta=1e4)
        ),
        sliding_window_pattern=2,
    ),
    "mixtral": dict(router_jitter_noise=0.1, output_router_logits=True),
    "mamba2": dict(time_step_limit=[0.0, {"__float__": "Infinity"}], chunk_size=256),
    "mpt": dict(attn_config=dict(alibi=True, attn_pdrop=0.0, clip_qkv=None), norm_type="layernorm"),
    "gpt2": dict(attn_pdrop=0.1, summary_type="cls_index", n_ctx=8),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      seeds: the contents of valid files.
      codec: what a mutation changes in a content, besides its bytes.
      read: read one content, which is to return or to raise `ConfigError`.
      words: names and values of the format that mutations insert.
    """

    seeds: Sequence[bytes]
    codec: Codec
    read: Callable[[bytes], object]
    words: Sequence[str]


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _directories() -> dict[str, Path]:
    """A small model of each family in one file, and again in several with an index."""
    directories = {}
    for name, family in FAMILIES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fields of other families
            config = decoder_config({"architectures": [family.architecture], **SIZES})
        model = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0))),
        )
        for folder, size in ((name, 1 << 30), (f"{name}-shards", 4_000)):
            directories[folder] = _scratch() / folder
            save(model, directories[folder], name, shard_bytes=size)
    return directories


def _words(contents: Sequence[bytes]) -> tuple[str, ...]:
    """All names and texts in JSON objects."""

    def inside(value):
        if isinstance(value, dict):
            yield from value
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from inside(item)
        if isinstance(value, str):
            yield value

    return tuple(sorted({word for content in contents for word in inside(json.loads(content))}))


def config_json() -> Kind:
    """config.json, beside the tensors of its family."""
    folders = {name: folder for name, folder in _directories().items() if name in FAMILIES}
    seeds = []
    for name, folder in folders.items():
        content = (folder / "config.json").read_bytes()
        seeds.append(content)
        seeds.append(json.dumps({**json.loads(content), **_MORE.get(name, {})}).encode())
    readers = {name: Reader(folder) for name, folder in folders.items()}
    path = _scratch() / "config.json"
    compared = set()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        hf = read_object(path)
        read_block(Fields(hf))
        config, family = decoder_config(hf), family_of(hf)
        if config not in compared:  # shapes take a while, and most mutations change none
            compared.add(config)
            match(config, family, readers[family.model_type])

    return Kind(seeds, of_json, read, _words(seeds))


def safetensors_index() -> Kind:
    """model.safetensors.index.json, beside the files that it names."""
    folder = _scratch() / "index"
    shutil.copytree(_directories()["mixtral-shards"], folder, dirs_exist_ok=True)
    seeds = [(folder / INDEX).read_bytes()]

    def read(content: bytes) -> None:
        (folder / INDEX).write_bytes(content)
        reader = Reader(folder)
        for name in reader.names:
            reader.header(name)

    return Kind(seeds, of_json, read, _words(seeds))


def safetensors() -> Kind:
    """model.safetensors of every family: its header, and the tensors if the header is accepted."""
    folders = {name: folder for name, folder in _directories().items() if name in FAMILIES}
    contents = {(folder / SINGLE).read_bytes(): name for name, folder in folders.items()}
    configs = {
        name: decoder_config(json.loads((folder / "config.json").read_text()))
        for name, folder in folders.items()
    }
    matched = {
        name: match(configs[name], FAMILIES[name], Reader(folder))[1]
        for name, folder in folders.items()
    }
    folder = _scratch() / "safetensors"
    folder.mkdir(exist_ok=True)

    def read(content: bytes) -> None:
        (folder / SINGLE).write_bytes(content)
        reader = Reader(folder)
        for name, family in FAMILIES.items():
            try:
                names = canonical_names(reader.names, family)
                headers = {ours: reader.header(theirs) for ours, theirs in names.items()}
                check_sizes(configs[name], family, headers)
                check_headers(headers, matched[name], family, configs[name])
            except ConfigError:
                continue
            for target in matched[name].values():
                if target.name in names:
                    from_theirs(target, reader.read(names[target.name]), configs[name])

    words = ("__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "F16", "F64", "I8",
             "F8_E4M3", "BOOL", "U64", "F4", "model.norm.weight", "format", "pt")  # fmt: skip
    return Kind(list(contents), of_safetensors, read, words)


def tokenizer_json() -> Kind:
    """tokenizer.json of every model of the `tokenizers` library, and its use on a text."""
    folder = _scratch() / "tokenizer"
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    text = "the cat sat on the mat, and the dog sat on the cat. " * 9
    train_bpe([text], 270, path)
    seeds = [path.read_bytes()]
    pieces = {
        piece: i for i, piece in enumerate(("[UNK]", "the", "cat", "s", "##at", "##a", "##t"))
    }
    for model in (
        models.WordLevel(pieces, unk_token="[UNK]"),
        models.WordPiece(pieces, unk_token="[UNK]"),
        models.Unigram([(piece, -float(i)) for piece, i in pieces.items()], 0),
    ):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["<bos>", "<eos>"])
        seeds.append(tokenizer.to_str().encode())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        tokenizer = load_tokenizer(str(path), "<bos>", "<eos>")
        (ids,) = tokenizer.encode_documents([b"the cat sat"])
        tokenizer.decode(ids)

    return Kind(seeds, of_json, read, _words(seeds))


def result_json() -> Kind:
    """result.json of a unit: the metrics that claims are measured on."""
    folder = _scratch() / "result"
    folder.mkdir(exist_ok=True)
    unit: Any = types.SimpleNamespace(workdir=folder)
    metrics = {"loss": 1.5, "losses": [2.0, 1.5], "steps": 3}
    described = dict(arm="a", seed=0, config={"model": {"width": 8}}, metrics=metrics)
    seeds = [json.dumps({**described, "started": 1.0, "seconds": 2.0}).encode()]

    def read(content: bytes) -> None:
        (folder / "result.json").write_bytes(content)
        results = Results({("a", 0): read_result(unit)["metrics"]}, (0,))
        results.scalars("a")
        for name in ("loss", "losses"):
            with contextlib.suppress(NotRun):
                results.metric("a", name)

    return Kind(seeds, of_json, read, _words(seeds))


def metrics_jsonl() -> Kind:
    """metrics.jsonl of a training, from which curves are drawn."""
    folder = _scratch() / "metrics"
    folder.mkdir(exist_ok=True)
    rows = [{"step": step, "loss": 2.0 / step, "eval_loss": 3.0 / step} for step in range(1, 9)]
    seeds = ["".join(json.dumps(row) + "\n" for row in rows).encode()]

    def read(content: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(content)
        unit: Any = types.SimpleNamespace(workdir=folder)
        eval_losses(unit)
        train_losses(unit)

    return Kind(seeds, of_lines, read, ("step", "loss", "eval_loss", "other", "NaN"))


def record_json() -> Kind:
    """The record of a complete run, from which the board is written."""
    recorded = results_folder()
    paths = sorted(recorded.rglob("*-*.json"), key=lambda path: (path.stat().st_size, path))
    seeds = [path.read_bytes() for path in paths if "plans" not in path.parts][:2]
    folder = _scratch() / "records"
    folder.mkdir(exist_ok=True)

    def read(content: bytes) -> None:
        (folder / "record-cpu.json").write_bytes(content)
        build(folder)

    return Kind(seeds, of_json, read, _words(seeds))


def stamp_json() -> Kind:
    """The stamp of a folder of compiled programs, which is read before anything else in it."""
    path = _scratch() / STAMP
    stamp = make_stamp({"w": np.zeros((2, 3), np.float32)}, {}, jax.devices()[:1])
    file = {"bytes": 100, "sha256": "0" * 64}
    program = {"arguments": "0" * 16, EXECUTABLE: file, PORTABLE: file}
    programs = {"decode": program, "chunk": program}
    seeds = [json.dumps({**stamp, "programs": programs}).encode()]
    signatures = {name: program["arguments"] for name in programs}

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_stamp(path, stamp, signatures, portable=True)

    return Kind(seeds, of_json, read, _words(seeds))


KINDS: dict[str, Callable[[], Kind]] = {
    "config.json": config_json,
    "model.safetensors.index.json": safetensors_index,
    "model.safetensors": safetensors,
    "tokenizer.json": tokenizer_json,
    "result.json": result_json,
    "metrics.jsonl": metrics_jsonl,
    "record.json": record_json,
    "stamp.json": stamp_json,
}
