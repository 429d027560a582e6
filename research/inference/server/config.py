"""The configuration of the server, and the keys that its clients show."""

import dataclasses
import hmac
import ipaddress
from pathlib import Path

from layers.config import ConfigError, check, check_types


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, and what it bounds.

    ``name``: of the model, as clients ask for it. ``port`` 0: a free one. ``api_key_file``: a key a
    line; required unless ``host`` is a loopback address. ``max_body``: bytes of a request.
    ``timeout``: seconds that the answer to a request may take, with its time in the queue.
    ``header_timeout``, ``body_timeout``: seconds in which the headers and the body must arrive.
    ``connections``: most at a time.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    max_body: int = 1 << 20
    timeout: float = 120.0
    header_timeout: float = 10.0
    body_timeout: float = 10.0
    connections: int = 512

    def __post_init__(self):
        check_types(self)
        check(0 <= self.port < 2**16, "port", self.port, "must be in [0, 65535]")
        for name in ("max_body", "timeout", "header_timeout", "body_timeout", "connections"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        allowed = is_loopback(self.host) or self.api_key_file is not None
        requirement = "requires api-key-file: without keys it must be a loopback address"
        check(allowed, "host", self.host, requirement)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Keys:
    """The keys in a file: one a line; empty lines and lines that begin with # are left out.

    Raises:
      ConfigError: the file cannot be read, or a line is no key; the message does not show it.
    """

    def __init__(self, path: str):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "must be UTF-8"
            raise ConfigError(f"api-key-file={path!r}: cannot be read: {reason}") from None
        self._keys = []
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and not line.startswith("#"):
                valid = line.isascii() and line.isprintable() and " " not in line
                requirement = "a key must have 16 or more printable ASCII characters and no space"
                check(valid and len(line) >= 16, "api-key-file", f"{path}:{number}", requirement)
                self._keys.append(line.encode())
        check(len(self._keys) > 0, "api-key-file", path, "must hold a key")

    def find(self, authorization: bytes) -> int | None:
        """The index of the key in the header ``Authorization: Bearer KEY``, or None.

        All keys are compared, each in constant time.
        """
        scheme, _, given = authorization.partition(b" ")
        found = None
        for index, key in enumerate(self._keys):
            if hmac.compare_digest(key, given.strip()) and scheme.lower() == b"bearer":
                found = index
        return found
