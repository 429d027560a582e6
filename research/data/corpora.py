"""Documents of a corpus, split into train and validation, with a hash of their content.

A document is UTF-8 bytes. Whether it is held out depends only on its hash (of its relative name in
the standard library, of its text elsewhere). So the split is the same on every machine, in every
process and for every order of the files.
"""

import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from layers.config import ConfigError, check
from research.data.config import DataConfig
from research.data.formats import TextHash, check_suffix, check_text, encode, kind, read_file

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
class Part:
    """What was read from one file, or from one library or dataset.

    Attributes:
      name: without the folder: a copy of the corpus elsewhere has equal parts.
      split: ``train`` or ``validation`` if the paths decide it, else empty.
      bytes, sha256: of the file; of a library's names and files; of a dataset's texts.
    """

    name: str
    split: str
    bytes: int
    sha256: str
    files: int = 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split, and what they were read from, in order."""

    train: list[bytes]
    validation: list[bytes]
    parts: list[Part]

    @property
    def sha256(self) -> str:
        """The hash of all that was read, in order; names count only in the standard library."""
        digest = TextHash()
        for part in self.parts:
            digest.add(f"{part.split} {part.sha256}".encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Document:
    text: bytes
    key: bytes  # hashed to choose the split
    split: str = ""  # where the paths decide it


def read_corpus(config: DataConfig) -> Corpus:
    """Read every document of ``config.source`` and split them; blank documents are dropped.

    Raises:
      ConfigError: no such file, a file, line or field that cannot be read, a file that is read for
        both splits, or no document left.
    """
    parts: list[Part] = []
    reader = {"stdlib": _stdlib, "files": _files, "hf": _hugging_face}[config.source]
    splits: dict[str, list[bytes]] = {"train": [], "validation": []}
    for document in reader(config, parts):
        if document.text and not document.text.isspace():
            splits[document.split or _split(document.key, config)].append(document.text)
    check(
        any(splits.values()),
        "paths" if config.paths else "source",
        config.paths or config.source,
        "must hold a document with text",
    )
    return Corpus(splits["train"], splits["validation"], parts)


def source_files(config: DataConfig) -> list[Path]:
    """The files on this machine that are read, in order; not those of the standard library.

    Raises:
      ConfigError: a path of ``source="files"`` is no file that can be read, or is given for both
        splits.
    """
    if config.source == "hf":
        return sorted(p for p in Path(config.paths[0]).rglob("*") if p.is_file())
    return [path for _, path in _paths(config)]


def _split(key: bytes, config: DataConfig) -> str:
    bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
    return "validation" if bits < config.validation_fraction * 2**64 else "train"


def _stdlib(config: DataConfig, parts: list[Part]) -> Iterator[_Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_STDLIB and not f.startswith("config-")]
        names += [
            (Path(folder) / f).relative_to(root).as_posix()
            for f in files
            if f.endswith(".py") and not f.startswith(_MACHINE_FILES)
        ]
    digest, size = TextHash(), 0
    for name in sorted(names):
        content = (root / name).read_bytes()
        if config.tokenizer != "byte":  # other tokenizers read characters
            check_text(content, "source", f"stdlib, {name}")
        digest.add(name.encode())
        digest.add(content)
        size += len(content)
        yield _Document(content, name.encode())
    name = f"Python {platform.python_version()}"
    parts.append(Part(name, "", size, digest.hexdigest(), len(names)))


def _paths(config: DataConfig) -> list[tuple[str, Path]]:
    """``(field, file)`` of all files of ``source="files"``: those for training come first."""
    train = _expand("paths", config.paths)
    validation = _expand("validation_paths", config.validation_paths)
    for identity, path in validation.items():
        other = train.get(identity)
        check(
            other is None,
            "validation_paths",
            str(path),
            f"must not be read for training too (paths: {str(other)!r})",
        )
    return [
        (field, path)
        for field, found in (("paths", train), ("validation_paths", validation))
        for path in sorted(found.values())
    ]


def _expand(field: str, patterns: tuple[str, ...]) -> dict[tuple[int, int], Path]:
    """The files that match ``patterns``, by device and inode: a file counts once, however named."""
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.lexists(pattern):
            matches = [pattern]
        else:
            matches = glob.glob(pattern, recursive=True)
            check(bool(matches), field, pattern, "no such file, and no file matches it as a glob")
            matches = [m for m in matches if not os.path.isdir(m)]
        for match in matches:
            check(os.path.exists(match), field, match, "is a link to a file that does not exist")
            check(
                not os.path.isdir(match),
                field,
                match,
                f"must be a file; for a directory give a glob such as {match}/**/*.txt",
            )
            check(os.path.isfile(match), field, match, "must be a file, not a device or a pipe")
            check(os.access(match, os.R_OK), field, match, "must be readable")
            path, status = Path(match), os.stat(match)
            check_suffix(path, field)
            identity = status.st_dev, status.st_ino
            files[identity] = min(path, files.get(identity, path))
        check(bool(matches), field, pattern, "matches directories only, no file")
    return files


def _files(config: DataConfig, parts: list[Part]) -> Iterator[_Document]:
    files = _paths(config)
    kinds = {kind(path) for _, path in files}
    check(
        config.text_field == DataConfig.text_field or "json" in kinds,
        "text_field",
        config.text_field,
        "only JSON has fields, and none of the files is .jsonl or .json",
    )
    separated = False
    for field, path in files:
        split = ""
        if config.validation_paths:
            split = "train" if field == "paths" else "validation"
        texts, size, sha256 = read_file(path, field, config)
        separated |= kind(path) == "text" and len(texts) > 1
        parts.append(Part(path.name, split, size, sha256))
        for text in texts:
            yield _Document(text, text, split)
    check(
        separated or not config.document_separator,
        "document_separator",
        config.document_separator,
        "must occur in a plain-text file",
    )


def _hugging_face(config: DataConfig, parts: list[Part]) -> Iterator[_Document]:
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
    digest = TextHash()
    for index, row in enumerate(rows.select_columns(config.text_field)):
        content = encode(row[config.text_field], config, f"{name} row {index}")
        digest.add(content)
        yield _Document(content, content)
    parts.append(Part(name, "", digest.bytes, digest.hexdigest()))
