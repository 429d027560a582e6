"""The documents of one file: encodings, compression, JSON, and what is refused."""

import bz2
import gzip
import hashlib
import json
import lzma
import tracemalloc

import pytest

from layers.config import ConfigError
from research.data import DataConfig, formats, read_corpus
from research.data.formats import check_text, read_file

TEXT = "å 𝄞\nfin"
ROWS = '{"text": "one\u2028line"}\n{"text": "två"}\n'


def documents(path, content, **options):
    """The documents of a file with ``content``."""
    path.write_bytes(content)
    return read_file(path, "paths", DataConfig(source="files", paths=(str(path),), **options))[0]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_encodings(encoding, tmp_path):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    assert documents(tmp_path / "a.txt", (mark + TEXT).encode(encoding)) == [TEXT.encode()]
    lines = documents(tmp_path / "a.jsonl", (mark + ROWS).encode(encoding))
    assert lines == ["one\u2028line".encode(), "två".encode()]


@pytest.mark.parametrize(
    "content, wrong",
    [
        ("abcå\né".encode() + b"\xff", "byte 0xff in line 2"),
        (b"ab\n\xc3ad", "byte 0xc3 in line 2"),
        (b"abcdefg\xc3", "byte 0xc3 in line 1"),
        ("abcå\né".encode() + b"e\0", "NUL at byte 9"),
    ],
)
def test_what_is_wrong_is_found_across_blocks(content, wrong, monkeypatch):
    monkeypatch.setattr(formats, "_BLOCK", 4)
    with pytest.raises(ConfigError, match=f"paths='a': must be UTF-8, .*{wrong}"):
        check_text(content, "paths", "a")


@pytest.mark.parametrize("suffix", ["", ".txt", ".gz", ".TXT.GZ", ".bz2", ".xz"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_whatever_the_name(compress, suffix, tmp_path):
    path, content = tmp_path / f"a{suffix}", compress(TEXT.encode("utf-16"))
    assert documents(path, content) == [TEXT.encode()]
    _, size, sha256 = read_file(path, "paths", DataConfig(source="files", paths=(str(path),)))
    assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines(name, end, tmp_path):
    content = ROWS.replace("\n", end).encode()
    packed = gzip.compress(content) if name.endswith(".gz") else content
    assert documents(tmp_path / name, packed) == ["one\u2028line".encode(), "två".encode()]


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.xz"])
def test_a_json_array(name, tmp_path):
    rows = [{"text": "one]"}, {"other": [1, {}], "text": "två"}, {"text": ""}]
    for indent in (None, 1):
        content = f" \n{json.dumps(rows, indent=indent)} \n".encode()
        packed = lzma.compress(content) if name.endswith(".xz") else content
        assert documents(tmp_path / name, packed) == [b"one]", "två".encode(), b""]


def test_an_empty_array_has_no_document(tmp_path):
    assert documents(tmp_path / "a.json", b" [ ] ") == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator_end", ["\n", "\r\n"])
def test_lines_of_plain_text_end_with_a_newline(end, separator_end, tmp_path):
    content = "one\nline\n\ntwo".replace("\n", end).encode()
    found = documents(tmp_path / "a.txt", content, document_separator=2 * separator_end)
    assert found == [b"one\nline", b"two"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "fin\nå".encode("latin1"), "must be UTF-8, .*byte 0xe5 in line 2"),
        ("a.txt", "fin".encode("utf-16-le"), "must be UTF-8, or UTF-16 .* byte order mark; .*NUL"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "a.jsonl:1': must be UTF-8, .*NUL"),
        ("a.jsonl", b'\r\n{"text": "\xe5"}', "a.jsonl:2': must be UTF-8"),
        ("a.json", b'[{"text": "\xe5"}]', "must be UTF-8, .*byte 0xe5"),
        ("a.txt", "å".encode("utf-16") + b"\0", "cannot be read .*truncated"),
        ("a.txt", bytes(range(256)), "must be UTF-8"),
        ("a.csv", b"text\nx", "must be plain text, JSON or ArrayRecord: write the rows"),
        ("a.TSV", b"text\nx", "must be plain text, JSON or ArrayRecord: write the rows"),
        ("a.parquet", b"PAR1", "a.parquet': must be plain .*: convert it to .jsonl"),
        ("a.txt.zst", b"", "a.txt.zst': must be plain .*: unpack it first"),
        ("a.tar.gz", b"", "a.tar.gz': must be plain .*: unpack it first"),
        ("a.txt", b"\x28\xb5\x2f\xfd", "a.txt': must be plain .*is .zst: unpack it first"),
        ("a.jsonl", b"PK\x03\x04", "a.jsonl': must be plain .*is .zip: unpack it first"),
        ("a.gz", b"text", "a.gz': cannot be read .*Not a gzipped file"),
        ("a.txt", gzip.compress(b"x" * 99, mtime=0)[:-9], "a.txt': cannot be read .*ended before"),
        ("a.xz", b"text", "a.xz': cannot be read"),
        ("a.bz2", b"text", "a.bz2': cannot be read"),
    ],
)
def test_what_is_no_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_corpus(DataConfig(source="files", paths=(str(tmp_path / name),)))
    assert str(error.value).startswith("paths='") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"text": "x"', "must be a"),
        ("null", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("3", "must be a JSON object"),
        ("[" * 200_000, r"must be a .*\(nested too deeply\)"),
        ("9" * 5000, "must be a .*integer string conversion"),
        ('{"body": "x", "a\\nb": 1}', r"text_field='text': no such field at .*; .*: body, a b$"),
        ('{"text": 3}', "text_field='text': must hold a string, holds int at "),
        ('{"text": null}', "text_field='text': must hold a string, holds NoneType at "),
        (r'{"text": "\ud800"}', "text_field='text': not valid Unicode at "),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_bad_row_is_named(name, row, message, tmp_path):
    first, path = '{"text": "fine"}', tmp_path / name
    if name == "a.json":
        content, location = f"[{first}, {row}]", f"{path}(, element 2)?"
    else:
        content, location = f"{first}\n{row}\n", f"{path}:2"
    with pytest.raises(ConfigError, match=message) as error:
        documents(path, content.encode())
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=location):
        documents(path, content.encode())


@pytest.mark.parametrize("end", ["", "]]", ",]", "] x"])
def test_an_array_ends_once(end, tmp_path):
    with pytest.raises(ConfigError, match="a.json': must be a JSON array .*line 1 column"):
        documents(tmp_path / "a.json", b'[{"text": "fine"}' + end.encode())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_reading_holds_two_copies(name, tmp_path):
    text = "abcdefg\n" * 500_000
    row = json.dumps({"text": text}) if name != "a.txt" else text.replace("\n", "\r\n")
    content = f"[{row}]" if name == "a.json" else row
    (tmp_path / name).write_text(content)
    config = DataConfig(source="files", paths=(str(tmp_path / name),), validation_fraction=0)
    tracemalloc.start()
    corpus = read_corpus(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.train == [text.encode()]
    assert peak < 2.2 * len(content) + 4 * 2**20
