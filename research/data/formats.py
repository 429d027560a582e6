"""The documents of one file: plain text, JSON lines, a JSON array or ArrayRecord.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. gzip, bzip2 and xz are read as they are,
whatever the file is called. Other binary formats are refused by name.

A file is read as a stream: beside the documents, memory holds one copy of a plain-text file or of
one line of JSON lines, or up to two of a JSON array.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check
from research.data.config import DataConfig

_LINES = {".jsonl", ".ndjson"}
_RECORDS = {".array_record", ".arrayrecord"}
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSED_BEGIN = {b"\x1f\x8b\x08": ".gz", b"BZh91AY&SY": ".bz2", b"\xfd7zXZ\0": ".xz"}
_TABLE = "write the rows of a table as .jsonl, or call it .txt to read it as plain text"
_COLUMNS = "convert it to .jsonl, or read its folder with source='hf'"
_PACKED = "unpack it first, only .gz, .bz2 and .xz are read as they are"
_NO_TEXT = "convert it to .txt or .jsonl"
_REFUSED = {
    suffix: advice
    for suffixes, advice in (
        (".csv .tsv", _TABLE),
        (".parquet .arrow .feather", _COLUMNS),
        (".zst .lz4 .zip .7z .tar .tgz .tbz2 .txz", _PACKED),
        (".npy .npz .bin .pdf .docx .safetensors", _NO_TEXT),
    )
    for suffix in suffixes.split()
}
_REFUSED_BEGIN = {b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip", b"%PDF-": ".pdf"}
# UTF-32 first: its mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENCODINGS = "must be UTF-8, or UTF-16 or UTF-32 with a byte order mark"
_BLOCK = 1 << 20


def kind(path: Path) -> str:
    """``text``, ``json`` (lines or an array) or ``records``, by the suffix of ``path``."""
    suffix = _suffix(path)
    if suffix in _RECORDS:
        return "records"
    return "json" if suffix in _LINES or suffix == ".json" else "text"


def check_suffix(path: Path, field: str) -> None:
    """Raise `ConfigError` if a file with the suffix of ``path`` is not read; says what to do."""
    advice = _REFUSED.get(_suffix(path))
    check(advice is None, field, str(path), f"must be plain text, JSON or ArrayRecord: {advice}")


def read_file(path: Path, field: str, config: DataConfig) -> tuple[list[bytes], int, str]:
    """The documents of ``path``, with the number and the sha256 of the bytes that hold them.

    The sha256 is that of the file; of an ArrayRecord file, that of its records.

    Raises:
      ConfigError: ``path`` cannot be read or is not what its suffix says; the message names
        ``field``, the file and, in JSON lines, the line.
    """
    if kind(path) == "records":
        return _array_record(path, field)
    try:
        with open(path, "rb", buffering=0) as raw:
            hashed = _Hashed(raw)
            text = _utf8(_unpacked(hashed, path, field))
            documents = list(_documents(text, path, field, config))
            while hashed.read(_BLOCK):  # what follows the compressed data
                pass
    except (EOFError, zlib.error, lzma.LZMAError, OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{field}={str(path)!r}: cannot be read ({reason})") from None
    return documents, hashed.bytes, hashed.sha256.hexdigest()


class TextHash:
    """sha256 over a sequence of byte strings; their lengths make it unique."""

    def __init__(self):
        self._sha256, self.bytes = hashlib.sha256(), 0

    def add(self, text: bytes) -> None:
        self._sha256.update(len(text).to_bytes(8, "little"))
        self._sha256.update(text)
        self.bytes += len(text)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def encode(text: object, config: DataConfig, location: str) -> bytes:
    """The UTF-8 of ``text``, which ``text_field`` holds; `ConfigError` if it is no valid string."""
    check(
        isinstance(text, str),
        "text_field",
        config.text_field,
        f"must hold a string, holds {type(text).__name__} at {location}",
    )
    assert isinstance(text, str)
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate
        raise ConfigError(
            f"text_field={config.text_field!r}: not valid Unicode at {location} ({error.reason})"
        ) from None


def check_text(content: bytes, field: str, location: str) -> None:
    """Raise `ConfigError` unless ``content`` is UTF-8 without NUL; checked in blocks."""
    nul = content.find(b"\0")
    check(nul < 0, field, location, f"{_ENCODINGS}; has a NUL at byte {nul}")
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(content)
    for start in range(0, len(content), _BLOCK):
        begin = start - len(decoder.getstate()[0])  # of the bytes that are decoded next
        try:
            decoder.decode(view[start : start + _BLOCK], final=start + _BLOCK >= len(content))
        except UnicodeDecodeError as error:
            at = begin + error.start
            line = content.count(b"\n", 0, at) + 1
            wrong = f"byte {content[at]:#04x} in line {line}: {error.reason}"
            raise ConfigError(f"{field}={location!r}: {_ENCODINGS} ({wrong})") from None


def _suffix(path: Path) -> str:
    """The suffix of ``path`` in lower case, without that of the compression."""
    name = Path(path.name.lower())
    return name.with_suffix("").suffix if name.suffix in _COMPRESSED else name.suffix


class _Hashed(io.RawIOBase):
    """The bytes of a file, hashed as they are read."""

    def __init__(self, file: Any):
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.bytes += count
        return count


class _Recoded(io.RawIOBase):
    """The bytes of a file in another encoding, as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str):
        self._file, self._decoder = file, codecs.getincrementaldecoder(encoding)()
        self._rest, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest and not self._ended:
            block = self._file.read(_BLOCK)
            self._ended = not block
            self._rest = self._decoder.decode(block, final=self._ended).encode()
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)


def _unpacked(hashed: _Hashed, path: Path, field: str) -> io.BufferedReader:
    file: Any = io.BufferedReader(hashed, _BLOCK)
    begin = file.peek(16)[:16]
    for magic, suffix in _REFUSED_BEGIN.items():
        wrong = f"must be plain text, JSON or ArrayRecord, and is {suffix}: {_REFUSED[suffix]}"
        check(not begin.startswith(magic), field, str(path), wrong)
    compression = path.suffix.lower()
    for magic, suffix in _COMPRESSED_BEGIN.items():
        compression = suffix if begin.startswith(magic) else compression
    if compression not in _COMPRESSED:
        return file
    return io.BufferedReader(_COMPRESSED[compression](file), _BLOCK)


def _utf8(file: io.BufferedReader) -> io.BufferedReader:
    begin = file.peek(4)[:4]
    if begin.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    for mark, encoding in _MARKS:
        if begin.startswith(mark):
            return io.BufferedReader(_Recoded(file, encoding), _BLOCK)
    return file


def _documents(
    file: io.BufferedReader, path: Path, field: str, config: DataConfig
) -> Iterator[bytes]:
    if kind(path) == "text":
        # as Python reads text: every line ends with \n
        content = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        check_text(content, field, str(path))
        separator = config.document_separator.replace("\r\n", "\n").replace("\r", "\n").encode()
        yield from content.split(separator) if separator else [content]
    elif _suffix(path) == ".json" and file.peek(_BLOCK).lstrip().startswith(b"["):
        yield from _json_array(file.read(), path, field, config)
    else:
        yield from _json_lines(file, path, field, config)


def _json_lines(
    file: io.BufferedReader, path: Path, field: str, config: DataConfig
) -> Iterator[bytes]:
    number = 0
    while line := file.readline():
        # Not str.splitlines: JSON allows U+2028 inside a string. Each copy is deleted before the
        # next is made: one line may be most of the corpus.
        lines = line.splitlines()[::-1] if b"\r" in line else [line]
        while lines:
            line, number = lines.pop(), number + 1
            location = f"{path}:{number}"
            if not line.strip(b" \t\r\n"):
                continue
            check(b"\0" not in line, field, location, f"{_ENCODINGS}; has a NUL")
            try:
                text = line.decode()
                del line
                row = json.loads(text)
                del text
            except UnicodeDecodeError as error:
                raise ConfigError(f"{field}={location!r}: {_ENCODINGS} ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                what = "a line of JSON"
                what += ", or the file an array" if _suffix(path) == ".json" else ""
                raise _no_json(field, location, what, error) from None
            value = _text(row, config, field, location)
            del row
            yield encode(value, config, location)
            del value


def _json_array(content: bytes, path: Path, field: str, config: DataConfig) -> Iterator[bytes]:
    check_text(content, field, str(path))
    text = content.decode()
    del content
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(field, str(path), "a JSON array", error) from None
    del text
    for number, row in enumerate(rows, 1):
        location = f"{path}, element {number}"
        yield encode(_text(row, config, field, location), config, location)


def _no_json(field: str, location: str, what: str, error: Exception) -> ConfigError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return ConfigError(f"{field}={location!r}: must be {what} ({reason})")


def _text(row: object, config: DataConfig, field: str, location: str) -> object:
    """The value of ``text_field`` in the JSON object ``row``."""
    check(isinstance(row, dict), field, location, "must be a JSON object")
    assert isinstance(row, dict)
    names = [" ".join(str(name).split())[:40] for name in [*row][:8]]
    check(
        config.text_field in row,
        "text_field",
        config.text_field,
        f"no such field at {location}; its fields: {', '.join(names) or 'none'}",
    )
    return row[config.text_field]


def _array_record(path: Path, field: str) -> tuple[list[bytes], int, str]:
    """The records of a file; each is the UTF-8 text of one document."""
    try:
        import array_record  # noqa: F401
        from grain.sources import ArrayRecordDataSource
    except ImportError:
        raise ConfigError(
            f"{field}={str(path)!r}: ArrayRecord requires `pip install array-record`"
        ) from None
    documents, digest = [], TextHash()
    try:
        source: Any = ArrayRecordDataSource(str(path))
        with source:
            for start in range(0, len(source), 1024):
                stop = min(start + 1024, len(source))
                documents += source.__getitems__(range(start, stop))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{field}={str(path)!r}: must be an ArrayRecord file ({reason})"
        ) from None
    for index, text in enumerate(documents):
        check_text(text, field, f"{path}, record {index}")
        digest.add(text)
    return documents, digest.bytes, digest.hexdigest()
