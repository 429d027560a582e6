"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``."""

import json
import re
from typing import Any

from layers.config import ConfigError

_LONGEST = 1_000  # characters of a message
_FIELD = re.compile(r"([A-Za-z_][\w.\-\[\]]*)[=:]")


class ServerError(Exception):
    """An answer with an error ``status``.

    ``param`` is the field of the request; ``headers`` are sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self._param, self._code = param, code

    def content(self) -> dict[str, Any]:
        """The JSON object."""
        message = str(self)
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}…"
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else None)
        return {
            "error": {
                "message": message,
                "type": kind or "server_error",
                "param": self._param,
                "code": self._code,
            }
        }

    def body(self) -> bytes:
        return dump(self.content())


def invalid(error: ConfigError, code: str | None = None) -> ServerError:
    """400 for a value of the request; the message begins with its field."""
    message = " ".join(str(error).split())
    field = _FIELD.match(message)
    return ServerError(400, message, param=field and field[1], code=code)


def dump(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
