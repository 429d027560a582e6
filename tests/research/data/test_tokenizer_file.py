"""A tokenizer.json of any kind: special tokens in text, ids with holes, names, and damage."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, load_tokenizer, make_dataset, train_bpe, vocabulary_size
from research.training import TrainingConfig, train

SPELLED = "say <eos> aloud<bos> <eos><pad>"
SPECIAL = ("<unk>", "<bos>", "<eos>", "<pad>")
LETTERS = [chr(i) for i in range(33, 127)]
UNICODE = ["é", "語"]


def _words(*extra):
    return {piece: i for i, piece in enumerate([*SPECIAL, *extra, *LETTERS, *UNICODE])}


def _byte_level(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet, "<e", "os", "os>"])}
    # these merges make a special token from its letters
    vocabulary |= {"Ġ<": len(vocabulary), "<eos": len(vocabulary) + 1}
    merges = [("o", "s"), ("<", "e"), ("<e", "os"), ("os", ">"), ("<eos", ">")]
    model = models.BPE(vocabulary, merges, **options)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram():
    pieces = [(name, 0.0) for name in SPECIAL]  # as sentencepiece has them: the best of all scores
    pieces += [(piece, -3.0) for piece in ["▁", "▁say", *LETTERS, *UNICODE]]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _word_piece():
    vocabulary = _words(*(f"##{piece}" for piece in [*LETTERS, *UNICODE]))
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    # letters, digits, punctuation and space only, also in the names of added tokens
    unknown = tokenizers.Regex(r"[^\p{L}\p{N}\p{P}\p{S}\s]")
    tokenizer.normalizer = normalizers.Replace(unknown, "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _prefixed_bpe():
    whole = ("<e", "<eo", "<eos")
    vocabulary = _words(*whole, *(f"##{piece}" for piece in [*LETTERS, *UNICODE]))
    merges = [("<", "##e"), ("<e", "##o"), ("<eo", "##s"), ("<eos", "##>")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", continuing_subword_prefix="##")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _sentencepiece_bpe():
    vocabulary = _words("▁", "<eo", "s>", "eo")
    merges = [("e", "o"), ("s", ">"), ("<", "eo"), ("<eo", "s>")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "byte-level-whole-words": lambda: _byte_level(ignore_merges=True),
    "unigram": _unigram,
    "word-piece": _word_piece,
    "prefixed-bpe": _prefixed_bpe,
    "sentencepiece-bpe": _sentencepiece_bpe,
}
# how a file may declare the token that ends a document
FLAGS = {
    "plain": dict(special=True),
    "normalized": dict(special=True, normalized=True),
    "strips": dict(special=True, lstrip=True, rstrip=True),
    "single-word": dict(special=True, single_word=True),
    "not-special": dict(special=False),
    "not-added": None,
}


def save(tokenizer, path, flags=FLAGS["plain"], **template):
    for name in SPECIAL:
        if name != "<eos>":
            tokenizer.add_special_tokens([name])
        elif flags is not None:
            add = tokenizer.add_special_tokens if flags["special"] else tokenizer.add_tokens
            add([AddedToken(name, **flags)])
    if template:
        ids = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(special_tokens=ids, **template)
    tokenizer.save(str(path))
    return str(path)


def documents_of(path, text, tmp_path):
    """The only document that training sees of ``text``, targets included."""
    (tmp_path / "text.txt").write_text(text)
    data = DataConfig(
        source="files", paths=(str(tmp_path / "text.txt"),), validation_fraction=0.0,
        tokenizer=path, sequence_length=256, batch_size=1, packing="first_fit",
    )  # fmt: skip
    batch = next(iter(make_dataset(data, num_epochs=1)))
    count = int(batch["weights"].sum())
    return [*batch["tokens"][0, :count].tolist(), int(batch["targets"][0, count - 1])]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_spells_special_tokens_has_one_beginning_and_one_end(kind, flags, tmp_path):
    both = dict(single="<bos> $A <eos>")
    path = save(KINDS[kind](), tmp_path / "tokenizer.json", FLAGS[flags], **both)
    tokenizer = load_tokenizer(path)
    special = {tokenizer.token_id("", name) for name in SPECIAL}
    ids = documents_of(path, SPELLED, tmp_path)
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
    assert not special & set(ids[1:-1])
    assert ids[1:-1] == tokenizer.encode(SPELLED)
    assert tokenizer.decode(ids) == SPELLED
    shown = tokenizer.decode([tokenizer.bos, *tokenizer.encode("say"), tokenizer.eos], True)
    assert shown.replace(" ", "") == "<bos>say<eos>"
    assert tokenizer.eos in tokenizer.encode("say <eos> aloud", special_tokens=True)
    assert tokenizer.beginning("say") == tokenizer.beginning("") == [tokenizer.bos]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_nothing_special_is_encoded_as_the_library_does(kind, tmp_path):
    path = save(KINDS[kind](), tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(path)
    for text in ("say it aloud", "é<e os>語", "  two  spaces ", "<eo s>", "\u3042 unknown"):
        ids = load_tokenizer(path).encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert load_tokenizer(path).decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_encodes_special_tokens_as_text_in_the_same_way(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = save(KINDS[kind](), tmp_path / "tokenizer.json")
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    # transformers only leaves them out of the search: the model must not have them either
    described["added_tokens"] = []
    model = described["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[p, -99.0 if p in SPECIAL else s] for p, s in model["vocab"]]
    elif "merges" in model:
        model["ignore_merges"] = False
        model["merges"] = [
            pair for pair in model["merges"] if "".join(pair).replace("##", "") not in SPECIAL
        ]
    else:
        hidden = {piece: f"\0{piece}" for piece in SPECIAL if piece != "<unk>"}
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    (tmp_path / "plain.json").write_text(json.dumps(described))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "plain.json"))
    assert load_tokenizer(path).encode(SPELLED) == theirs.encode(SPELLED, add_special_tokens=False)


def test_an_unknown_word_without_a_token_for_it_is_one_line(tmp_path):
    model = models.WordLevel({"say": 0, "<bos>": 1, "<eos>": 2})
    path = save_plain(tokenizers.Tokenizer(model), tmp_path)
    with pytest.raises(ConfigError, match="cannot encode the documents") as error:
        load_tokenizer(path).encode_documents([b"aloud"])
    assert "\n" not in str(error.value) and path in str(error.value)


def test_documents_that_give_no_token_are_refused(tmp_path):
    model = models.BPE({"a": 0, "<bos>": 1, "<eos>": 2}, [])  # drops what it does not know
    path = save_plain(tokenizers.Tokenizer(model), tmp_path)
    assert documents_of(path, "a b", tmp_path) == [1, 0, 2]
    with pytest.raises(ConfigError, match="encodes every document by no token"):
        documents_of(path, "b", tmp_path)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_split_that_gives_no_token_is_refused(packing, tmp_path):
    model = models.BPE({"a": 0, "<eos>": 1}, [])
    for name, text in (("train", "a"), ("held", "b")):
        (tmp_path / f"{name}.txt").write_text(text)
    data = DataConfig(
        source="files",
        paths=(f"{tmp_path}/train.txt",),
        validation_paths=(f"{tmp_path}/held.txt",),
        tokenizer=save_plain(tokenizers.Tokenizer(model), tmp_path),
        bos_token="",
        packing=packing,
    )
    make_dataset(data)
    with pytest.raises(ConfigError, match="encodes every document for validation by no token"):
        make_dataset(data, "validation")


def save_plain(tokenizer, tmp_path):
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def word_level(tmp_path, ids):
    """A word for each of ``ids``, among them <bos> and <eos>, the first two."""
    names = ["<bos>", "<eos>", *(f"w{i}" for i in ids[2:])]
    vocabulary = dict(zip(names, ids, strict=True))
    return save_plain(tokenizers.Tokenizer(models.WordLevel(vocabulary)), tmp_path)


@pytest.mark.parametrize("size", [300, 65_535, 65_536, 65_537, 131_072])
def test_ids_with_holes_are_neither_cut_nor_beyond_the_vocabulary(size, tmp_path):
    path = word_level(tmp_path, [0, 1, 7, size - 2, size - 1])
    config = DataConfig(tokenizer=path)
    assert vocabulary_size(config) == load_tokenizer(path).vocab_size == size
    [ids] = load_tokenizer(path).encode_documents([f"w{size - 1} w7 w{size - 2}".encode()])
    assert ids.tolist() == [size - 1, 7, size - 2]
    assert documents_of(path, f"w{size - 1} w7", tmp_path) == [0, size - 1, 7, 1]


def test_the_largest_id_may_be_the_end_of_a_document(tmp_path):
    path = word_level(tmp_path, [65_536, 70_000, 5])
    assert documents_of(path, "w5", tmp_path) == [65_536, 5, 70_000]


def test_a_model_with_too_few_ids_is_refused_before_anything_compiles(tmp_path):
    path = word_level(tmp_path, [0, 1, 2, 320])
    (tmp_path / "text.txt").write_text("w2 w320")
    data = DataConfig(
        source="files", paths=(str(tmp_path / "text.txt"),), validation_fraction=0.0,
        tokenizer=path, sequence_length=8, batch_size=1,
    )  # fmt: skip
    config = DecoderConfig(300, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(8))
    with pytest.raises(ConfigError, match=r"model.vocab_size=300: must be at least .* 321"):
        train(config, data, TrainingConfig(steps=1, eval_batches=0))


def name(path, file="tokenizer_config.json", **fields):
    (path / file).write_text(json.dumps(fields))


def test_a_tokenizer_without_a_beginning(tmp_path):
    path = save(_byte_level(), tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(path, bos_token="")
    assert tokenizer.bos is None and tokenizer.eos == 2
    name(tmp_path, bos_token=None, eos_token="<pad>", model_max_length=8)
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos is None and tokenizer.eos == 3
    assert documents_of(path, "say", tmp_path) == [*tokenizer.encode("say"), 3]


def test_names_are_those_of_the_files_beside_it_unless_configured(tmp_path):
    path = save(_byte_level(), tmp_path / "tokenizer.json")
    assert (load_tokenizer(path).bos, load_tokenizer(path).eos) == (1, 2)
    name(tmp_path, "special_tokens_map.json", eos_token={"content": "<unk>", "lstrip": False})
    assert (load_tokenizer(path).bos, load_tokenizer(path).eos) == (None, 0)
    name(tmp_path, bos_token={"content": "<eos>", "lstrip": False}, eos_token="<pad>")
    assert (load_tokenizer(path).bos, load_tokenizer(path).eos) == (2, 3)
    changed = load_tokenizer(path, bos_token="<bos>", eos_token="<eos>")
    assert (changed.bos, changed.eos) == (1, 2) and changed.sha256 != load_tokenizer(path).sha256


def test_changed_names_change_the_documents(tmp_path):
    path = save(_byte_level(), tmp_path / "tokenizer.json")
    assert documents_of(path, "say", tmp_path)[-1] == 2
    name(tmp_path, bos_token="<bos>", eos_token="<pad>")
    assert documents_of(path, "say", tmp_path)[-1] == 3


@pytest.mark.parametrize(
    "names, file, message",
    [
        (dict(eos_token="<eot>"), {}, "eos_token='<eot>': must be a token of '.*'; did you mean"),
        (dict(eos_token="end"), {}, "eos_token='end': .* e.g. one of .'<unk>', '<bos>'"),
        (dict(bos_token="<boss>"), {}, "bos_token='<boss>': .* did you mean '<bos>'"),
        (dict(eos_token=""), {}, "eos_token='': .* requires a token that ends a document"),
        ({}, dict(bos_token="<bos>"), "eos_token=None: .* requires a token that ends"),
        ({}, dict(eos_token="<eot>"), "eos_token='<eot>': must be a token"),
        ({}, dict(eos_token=7), "eos_token=7: must be text in '.*tokenizer_config.json'"),
        ({}, [], "tokenizer_config.json': must hold an object"),
        ({}, "{", "tokenizer_config.json': not JSON"),
    ],
)
def test_names_that_cannot_be_are_one_line(names, file, message, tmp_path):
    path = save(_byte_level(), tmp_path / "tokenizer.json")
    if file != {}:
        content = file if isinstance(file, str) else json.dumps(file)
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(path, **names)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "tokenizer.json"
    train_bpe(["the cat"], 262, path)
    return path.read_text()


def _edited(change):
    def edit(text):
        described = json.loads(text)
        change(described)
        return json.dumps(described).encode()

    return edit


DAMAGE = {
    "empty": lambda text: b"",
    "truncated": lambda text: text.encode()[:500],
    "list": lambda text: b"[]",
    "object": lambda text: b"{}",
    "null": lambda text: b"null",
    "not-utf8": lambda text: b"\xff\xfe" + text.encode(),
    "utf16": lambda text: text.encode("utf-16"),
    "other-json": lambda text: b'{"model": {"type": "BPE"}}',
    "unknown-model": _edited(lambda d: d["model"].update(type="Morpheme")),
    "no-model": _edited(lambda d: d.update(model=None)),
    "unknown-decoder": _edited(lambda d: d.update(decoder={"type": "Wishes"})),
    "empty-vocabulary": _edited(
        lambda d: d.update(model={**d["model"], "vocab": {}, "merges": []})
    ),
    "duplicated-id": _edited(lambda d: d["model"]["vocab"].update({"a": 99, "b": 99})),
    "duplicated-id-of-an-end": _edited(lambda d: d["added_tokens"][1].update(id=0)),
    "declared-elsewhere": _edited(
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 900, "content": "<x>"})
    ),
    "negative-id": _edited(lambda d: d["model"]["vocab"].update(a=-1)),
    "huge-id": _edited(lambda d: d["model"]["vocab"].update(a=2**32 - 1)),
    "merge-of-nothing": _edited(lambda d: d["model"]["merges"].append(["zz", "qq"])),
    "twice": _edited(
        lambda d: d.update(
            added_tokens=[], model=dict(type="Unigram", unk_id=0, vocab=[["a", 0.0], ["a", 0.0]])
        )
    ),
    "bad-pattern": _edited(
        lambda d: d.update(
            pre_tokenizer=dict(
                type="Split", pattern={"Regex": "("}, behavior="Isolated", invert=False
            )
        )
    ),
    "bad-charsmap": _edited(
        lambda d: d.update(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(damage, good, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(DAMAGE[damage](good))
    with pytest.raises(ConfigError, match="must be 'byte' or a readable") as error:
        make_dataset(DataConfig(tokenizer=str(path)))
    assert str(error.value).startswith(f"tokenizer={str(path)!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["absent/tokenizer.json", "."])
def test_no_file_is_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"tokenizer='{path}': must be 'byte' or a readable"):
        load_tokenizer(path)
