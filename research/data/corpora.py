"""Documents of a corpus, split into train and validation, with a hash of their content.

A document is UTF-8 bytes. Whether it is held out depends only on its hash (of its relative name in
the standard library, of its text elsewhere). So the split is the same on every machine, in every
process and for every order of the files.
"""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check
from research.data.config import DataConfig

# Suffixes of files that are not text.
_BINARY = {".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow", ".npy", ".npz", ".bin"}
_RECORDS = {".array_record", ".arrayrecord"}
# Folders that are left out: packages installed beside the library, its tests (18 MB of generated
# cases), and files that differ between machines with the same Python.
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "__pycache__",
    "lib-dynload",
    "ensurepip",
}
_MACHINE_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split; ``sha256`` covers the names and bytes of all that was read."""

    train: list[bytes]
    validation: list[bytes]
    sha256: str
    files: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Document:
    name: str
    text: bytes
    key: bytes  # hashed to choose the split
    held_out: bool = False  # from `validation_paths`


class _Hash:
    """sha256 over the names and bytes of all that is read; lengths make the encoding unique."""

    def __init__(self):
        self._sha256, self.files, self.bytes = hashlib.sha256(), 0, 0

    def add(self, name: str, content: bytes) -> None:
        for part in (name.encode(), content):
            self._sha256.update(len(part).to_bytes(8, "little") + part)
        self.files += 1
        self.bytes += len(content)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def read_corpus(config: DataConfig) -> Corpus:
    """Read every document of ``config.source`` and split them; empty documents are dropped.

    Raises:
      ConfigError: no such file, a line or field that cannot be read, or no document left.
    """
    digest = _Hash()
    reader = {"stdlib": _stdlib, "files": _files, "hf": _hugging_face}[config.source]
    documents = [d for d in reader(config, digest) if d.text]
    check(
        bool(documents),
        "paths" if config.paths else "source",
        config.paths or config.source,
        "must hold a document with text",
    )
    train, validation = [], []
    for document in documents:
        if config.tokenizer != "byte":  # other tokenizers read characters
            _check_utf8(document)
        explicit = bool(config.validation_paths)
        held_out = document.held_out if explicit else _held_out(document.key, config)
        (validation if held_out else train).append(document.text)
    return Corpus(train, validation, digest.hexdigest(), digest.files, digest.bytes)


def source_files(config: DataConfig) -> list[Path]:
    """The files that ``source="files"`` reads: train, then validation, each sorted."""
    return [*_expand("paths", config.paths), *_expand("validation_paths", config.validation_paths)]


def _check_utf8(document: _Document) -> None:
    try:
        document.text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"paths={document.name!r}: must be UTF-8 ({error})") from None


def _held_out(key: bytes, config: DataConfig) -> bool:
    bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
    return bits < config.validation_fraction * 2**64


def _stdlib(config: DataConfig, digest: _Hash) -> Iterator[_Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_STDLIB and not f.startswith("config-")]
        names += [
            (Path(folder) / f).relative_to(root).as_posix()
            for f in files
            if f.endswith(".py") and not f.startswith(_MACHINE_FILES)
        ]
    for name in sorted(names):
        content = (root / name).read_bytes()
        digest.add(name, content)
        yield _Document(name, content, name.encode())


def _expand(field: str, patterns: tuple[str, ...]) -> list[Path]:
    """The files that match ``patterns``, sorted and without duplicates."""
    files = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = glob.glob(pattern, recursive=True)
            check(bool(matches), field, pattern, "no such file, and no file matches it as a glob")
            matches = [m for m in matches if not os.path.isdir(m)]
        for match in matches:
            check(
                os.path.isfile(match),
                field,
                match,
                f"must be a file; for a directory give a glob such as {match}/**/*.txt",
            )
            check(os.access(match, os.R_OK), field, match, "must be readable")
            check(
                Path(match).suffix not in _BINARY,
                field,
                match,
                "must be plain text, .jsonl or .array_record; unpack or convert it first",
            )
            files.add(Path(match))
        check(bool(matches), field, pattern, "matches directories only, no file")
    return sorted(files)


def _files(config: DataConfig, digest: _Hash) -> Iterator[_Document]:
    for field in ("paths", "validation_paths"):
        for path in _expand(field, getattr(config, field)):
            for text in _read(path, config, field, digest):
                yield _Document(str(path), text, text, held_out=field == "validation_paths")


def _read(path: Path, config: DataConfig, field: str, digest: _Hash) -> Iterator[bytes]:
    if path.suffix in _RECORDS:
        yield from _array_record(path, field, digest)
        return
    content = path.read_bytes()
    # the name without the folder: a copy of the corpus elsewhere has the same hash
    digest.add(path.name, content)
    if path.suffix == ".jsonl":
        yield from _jsonl(path, content, config, field)
    else:
        separator = config.document_separator.encode()
        yield from content.split(separator) if separator else [content]


def _jsonl(path: Path, content: bytes, config: DataConfig, field: str) -> Iterator[bytes]:
    # bytes.splitlines splits at \n and \r only: JSON allows U+2028 inside a string
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{field}={location!r}: must be a line of JSON ({error})") from None
        check(isinstance(row, dict), field, location, "must be a JSON object")
        check(
            config.text_field in row,
            "text_field",
            config.text_field,
            f"no such field at {location}; its fields: {', '.join(map(str, row)) or 'none'}",
        )
        yield _encode(row[config.text_field], config, location)


def _encode(text: object, config: DataConfig, location: str) -> bytes:
    check(
        isinstance(text, str),
        "text_field",
        config.text_field,
        f"must hold a string, holds {type(text).__name__} at {location}",
    )
    try:
        return text.encode()  # type: ignore[union-attr]
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate
        raise ConfigError(
            f"text_field={config.text_field!r}: not valid Unicode at {location} ({error.reason})"
        ) from None


def _array_record(path: Path, field: str, digest: _Hash) -> Iterator[bytes]:
    """The records of a file; each is the UTF-8 text of one document."""
    try:
        import array_record  # noqa: F401
        from grain.sources import ArrayRecordDataSource
    except ImportError:
        raise ConfigError(
            f"{field}={str(path)!r}: ArrayRecord requires `pip install array-record`"
        ) from None
    try:
        source: Any = ArrayRecordDataSource(str(path))
        with source:
            for start in range(0, len(source), 1024):
                stop = min(start + 1024, len(source))
                for index, text in enumerate(source.__getitems__(range(start, stop)), start):
                    digest.add(f"{path.name}:{index}", text)
                    yield text
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{field}={str(path)!r}: must be an ArrayRecord file ({reason})"
        ) from None


def _hugging_face(config: DataConfig, digest: _Hash) -> Iterator[_Document]:
    try:
        import datasets
    except ImportError:
        raise ConfigError("source='hf': requires the `hf` extra (pip install -e '.[hf]')") from None
    name = config.paths[0]
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)
            rows = rows[config.hf_split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config.hf_subset, split=config.hf_split)
    except Exception as error:  # the library raises many types: missing, gated, offline, split
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"paths={name!r}: cannot load this dataset ({reason})") from None
    check(
        config.text_field in rows.column_names,
        "text_field",
        config.text_field,
        f"no such column in {name}; columns: {', '.join(rows.column_names)}",
    )
    for index, text in enumerate(rows.select_columns(config.text_field)):
        content = _encode(text[config.text_field], config, f"{name} row {index}")
        digest.add(str(index), content)
        yield _Document(f"{name} row {index}", content, content)
