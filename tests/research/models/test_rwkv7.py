"""RWKV-7's own files in and out, against the `rwkv` package that its authors publish."""

import os
import pickle

import jax
import numpy as np
import pytest

from layers.config import ConfigError
from layers.weights import flat
from research.cli import main
from research.inference import SamplingConfig, generate
from research.models import load, pickled, save
from research.training import load_model
from tests.research.models.conftest import make

torch = pytest.importorskip("torch")
pytest.importorskip("rwkv")

VOCAB, WIDTH, LAYERS, HIDDEN, HEAD = 13, 24, 3, 40, 8
RANKS = {"w": 3, "a": 4, "v": 5, "g": 6}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def tensors():
    """A random model as it is published: bar the first layer's ``v0``, ``v1`` and ``v2``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, at=0.0):
        return at + 0.3 * torch.randn(*shape, generator=generator)

    def norm(name):
        return {f"{name}.weight": random(WIDTH, at=1), f"{name}.bias": random(WIDTH)}

    held = {"emb.weight": random(VOCAB, WIDTH), **norm("blocks.0.ln0")}
    for layer in range(LAYERS):
        block, att, ffn = (f"blocks.{layer}{part}." for part in ("", ".att", ".ffn"))
        held |= norm(block + "ln1") | norm(block + "ln2") | norm(att + "ln_x")
        held |= {f"{att}x_{letter}": random(1, 1, WIDTH, at=0.5) for letter in "rwkvag"}
        for letter, rank in RANKS.items():
            if (letter, layer) != ("v", 0):
                held |= {
                    f"{att}{letter}1": random(WIDTH, rank),
                    f"{att}{letter}2": random(rank, WIDTH),
                }
                held |= {f"{att}{letter}0": random(1, 1, WIDTH)} if letter != "g" else {}
        held |= {f"{att}k_{letter}": random(1, 1, WIDTH) for letter in "ka"}
        held[att + "r_k"] = random(WIDTH // HEAD, HEAD)
        for name in ("receptance", "key", "value", "output"):
            held[f"{att}{name}.weight"] = random(WIDTH, WIDTH)
        held[ffn + "x_k"] = random(1, 1, WIDTH, at=0.5)
        held[ffn + "key.weight"], held[ffn + "value.weight"] = (
            random(HIDDEN, WIDTH), random(WIDTH, HIDDEN),
        )  # fmt: skip
    return held | norm("ln_out") | {"head.weight": random(VOCAB, WIDTH)}


def write(path, change=lambda held: None, dtype=torch.float32):
    held = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    change(held)
    torch.save(held, path)
    return path


def package(path):
    """The published implementation of the model in ``path``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_V7_ON", "1")
        patch.setenv("RWKV_JIT_ON", "0")
        from rwkv.model import RWKV_x070

    return RWKV_x070(str(path.with_suffix("")), "cpu fp32")


def logits_of(theirs):
    return theirs.forward(list(TOKENS), None, full_output=True)[0].numpy()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("rwkv7") / "model.pth")
    return package(path), load(path), path


def equal(one, other):
    for (name, a), b in zip(flat(one).items(), flat(other).values(), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_logits_are_those_of_the_package(pair):
    theirs, ours, _ = pair
    want = logits_of(theirs)
    got = ours(np.array([TOKENS])).logits_btv[0]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-5)


def test_greedy_tokens_are_those_of_the_package(pair):
    theirs, ours, _ = pair
    out, state = theirs.forward(list(TOKENS), None)
    want = []
    for _ in range(12):
        want.append(int(out.argmax()))
        out, state = theirs.forward([want[-1]], state)
    got = generate(ours, [TOKENS], SamplingConfig(max_new_tokens=12, temperature=0.0))
    assert got[0] == want


def test_there_and_back_the_package_computes_the_same(pair, tmp_path, capsys):
    theirs, ours, path = pair
    there = str(tmp_path / "there")
    assert main(["import", str(path), "--to", there]) == 0
    equal(load_model(there), ours)
    for out in (tmp_path / "new" / "back.pth", tmp_path / "directory"):
        assert main(["export", there, "--to", str(out)]) == 0
        equal(load(out), ours)
        assert load(out).config == ours.config
    back = tmp_path / "new" / "back.pth"
    assert [entry.name for entry in back.parent.iterdir()] == ["back.pth"]
    before, after = (torch.load(file, weights_only=True) for file in (path, back))
    # what is not looked at is written too
    assert after.keys() - before.keys() == {f"blocks.0.att.v{part}" for part in range(3)}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    np.testing.assert_array_equal(logits_of(package(back)), logits_of(theirs))


def test_published_files_are_bfloat16_and_stay_so(tmp_path, capsys):
    path = write(tmp_path / "model.pth", dtype=torch.bfloat16)
    there, back = tmp_path / "there", tmp_path / "back.pth"
    assert main(["import", str(path), "--to", str(there)]) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(there))} == {np.dtype("bfloat16")}
    assert main(["export", str(there), "--to", str(back)]) == 0
    before, after = (torch.load(file, weights_only=True) for file in (path, back))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def renamed(old, new):
    def change(held):
        held[new] = held.pop(old)

    return change


def put(name, value):
    return lambda held: held.update({name: value})


class Trap:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda held: held.pop("ln_out.bias"), "tensor='ln_out.bias': is missing"),
        (lambda held: held.pop("blocks.1.att.v1"), "tensor='blocks.1.att.v1': is missing"),
        # RWKV-6 has `time_faaaa` in its place
        (renamed("blocks.0.att.r_k", "blocks.0.att.time_faaaa"),
         "tensor='blocks.0.att.r_k': is missing: not an RWKV_x070"),
        (put("blocks.1.ffn.s1", torch.ones(1)), "blocks.1.ffn.s1': is not part of a RWKV_x070"),
        (put("blocks.1.att.x_r", torch.ones(WIDTH)),
         r"tensor blocks.1.att.x_r=\[24\]: must have shape \[1, 1, 24\]"),
        (put("emb.weight", torch.ones(WIDTH)), r"tensor emb.weight=\[24\]: must have 2 axes"),
        (put("steps", 7), "must be a dictionary of tensors"),
        (put("trap", Trap()), "cannot be read: it contains posix.system, not tensors alone$"),
        (put(7, torch.ones(1)), "must be a dictionary of tensors"),
        (put("emb.weight", torch.ones(1, 1).expand(10**6, 10**6)),
         "tensor='emb.weight': must be dense and in the file"),
        (put("emb.weight", torch.ones(65, WIDTH).to_sparse()),
         "tensor='emb.weight': must be dense and in the file"),
        (put("blocks.999999999.ln1.weight", torch.ones(WIDTH)),
         "num_hidden_layers=1000000000: must be ≤"),
        (put("blocks.1.ffn.x_k", torch.ones((1, 1, WIDTH), dtype=torch.int8)),
         "tensor blocks.1.ffn.x_k='int8': must be F64"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as raised:
        load(write(tmp_path / "model.pth", change))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_or_written_is_said(pair, tmp_path, monkeypatch, capsys):
    _, ours, _ = pair
    torn = tmp_path / "torn.pth"
    for content in (b"", b"1234", pickle.dumps([1])):
        torn.write_bytes(content)
        with pytest.raises(ConfigError, match="torn.pth': cannot be read"):
            load(torn)
    with pytest.raises(ConfigError, match="nowhere.pth': does not exist"):
        load(tmp_path / "nowhere.pth")
    with pytest.raises(ConfigError, match="torn.pth'.*must be absent or empty"):
        save(ours, torn, "rwkv7")
    make("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="family='llama': a .pth file requires family"):
        save(load(tmp_path / "llama"), tmp_path / "a.pth", "llama")
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    assert main(["import", str(torn), "--to", str(tmp_path / "there")]) == 2
    error = capsys.readouterr().err
    assert "requires PyTorch: pip install torch" in error
    with pytest.raises(ConfigError, match="a.pth': requires PyTorch"):
        save(ours, tmp_path / "a.pth", "rwkv7")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["llama", "torn.pth"]
