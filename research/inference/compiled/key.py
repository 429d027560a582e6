"""The user's key: a content is trusted if a tag by this key is beside it.

The key is 32 random bytes in ``$XDG_DATA_HOME/ablate/key`` (``~/.local/share/ablate/key``), which
the user alone can read. Whoever can read it can write programs that this user's processes run.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from layers.config import ConfigError, check

KEY = "key"
_SIZE = 32


def tag(content: bytes) -> str:
    """HMAC-SHA256 of ``content`` with the user's key, in hexadecimal; makes the key if need be.

    Raises:
      ConfigError: the key is not the user's own secret, or there is no folder for it.
    """
    with _folder(create=True) as folder:
        key = _read(folder)
        if key is None:
            key = _make(folder)
    return hmac.digest(key, content, hashlib.sha256).hex()


def is_tag(text: str, content: bytes) -> bool:
    """Whether ``text`` is the `tag` of ``content``, compared in constant time; False without a key.

    Raises:
      ConfigError: the key is not the user's own secret, or there is no folder for it.
    """
    try:
        with _folder(create=False) as folder:
            key = _read(folder)
    except FileNotFoundError:
        return False
    if key is None:
        return False
    expected = hmac.digest(key, content, hashlib.sha256).hex()
    return hmac.compare_digest(expected.encode(), text.encode())


def key_folder() -> Path:
    """The folder of the key; it need not exist.

    Raises:
      ConfigError: the environment names no such folder.
    """
    data = os.environ.get("XDG_DATA_HOME")
    if data:
        check(os.path.isabs(data), "XDG_DATA_HOME", data, "must be an absolute path")
        return Path(data) / "ablate"
    try:
        return Path.home() / ".local/share/ablate"
    except RuntimeError:
        raise ConfigError("HOME=None: must name the user's folder, for the key") from None


@contextlib.contextmanager
def _folder(create: bool) -> Iterator[int]:
    """The descriptor of the key's folder, in which nobody else can write."""
    path = key_folder()
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise ConfigError(f"folder={str(path)!r}: must be a folder, not a link or file") from None
    try:
        _check_owned(os.fstat(descriptor), "folder", path, forbidden=0o022)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(folder: int) -> bytes | None:
    """The key in ``folder``; None if there is none."""
    path = key_folder() / KEY
    try:
        descriptor = os.open(KEY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        link = stat.S_ISLNK(os.stat(KEY, dir_fd=folder, follow_symlinks=False).st_mode)
        reason = "must be a file, not a link" if link else f"cannot be read: {error.strerror}"
        raise ConfigError(f"file={str(path)!r}: {reason}") from None
    try:
        status = os.fstat(descriptor)
        check(stat.S_ISREG(status.st_mode), "file", str(path), "must be a file")
        _check_owned(status, "file", path, forbidden=0o077)
        key = os.read(descriptor, _SIZE + 1)
    finally:
        os.close(descriptor)
    check(len(key) == _SIZE, "file", str(path), f"must hold {_SIZE} bytes: delete it, and compile "
          "again")  # fmt: skip
    return key


def _make(folder: int) -> bytes:
    """Write a new key into ``folder``, or read that of a process that wrote one first."""
    temporary = f".{KEY}.{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_SIZE))
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, KEY, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.unlink(temporary, dir_fd=folder)
    key = _read(folder)
    assert key is not None  # it was linked just now
    return key


def _check_owned(status: os.stat_result, field: str, path: Path, forbidden: int) -> None:
    """Raise `ConfigError` unless this user owns the file and no ``forbidden`` bit is set."""
    owner = os.geteuid()
    check(status.st_uid == owner, field, str(path), f"must belong to user {owner}, belongs to "
          f"{status.st_uid}")  # fmt: skip
    mode = stat.S_IMODE(status.st_mode)
    who = "read" if forbidden & 0o044 else "written"
    check(not mode & forbidden, field, str(path), f"has mode {mode:03o}, so others may have {who} "
          "it: delete it, and compile again")  # fmt: skip
