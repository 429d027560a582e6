"""Chat templates: messages and tools become the text of a prompt, as in transformers."""

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check
from research.data.tokenizer_file import NAMING, named_token
from research.files import read_json

_SECONDS = 2.0  # to render one conversation
_START_SECONDS = 30.0  # for the process that renders to start
# a code point that Unicode reserves for such use; it is around special tokens that a user spells
_MARK = "\ufdd1"
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """The chat template in the folder of a tokenizer.

    Text in messages and tools that spells a special token is ordinary text: it ends no turn and
    begins none. (transformers does so with ``sanitize_control_tokens=True``.)

    Args:
      source: name → Jinja's text; ``default``, and ``tool_use`` where tools have another.
      names: special tokens by name, as variables of the template.
      special: the special tokens.
    """

    def __init__(self, source: Mapping[str, str], names: Mapping[str, str], special: Iterable[str]):
        self._source, self.names = dict(source), dict(names)
        listed = sorted(special, key=len, reverse=True)  # the longest of two that begin alike
        self._special = re.compile("|".join(map(re.escape, listed))) if listed else None
        self._renderer = _Renderer()

    def source(self, tools: bool) -> str:
        """The template that is used with or without tools."""
        named = "tool_use" if tools and "tool_use" in self._source else "default"
        return self._source[named]

    def pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[tuple[str, bool]]:
        """The text after which the model answers, in pieces: (text, whether it has special tokens).

        Raises:
          ConfigError: the template refuses the messages, or is not rendered within time and memory.
        """
        variables = {
            **self.names,
            "messages": self._marked(messages),
            "tools": self._marked(tools),
            "documents": None,
            "add_generation_prompt": True,
        }
        text = self._renderer.render(self.source(bool(tools)), variables)
        # a user's special tokens are between two marks
        pieces = enumerate(text.split(_MARK))
        return [(piece, i % 2 == 0) for i, piece in pieces if piece]

    def close(self) -> None:
        self._renderer.close()

    def _marked(self, value: Any) -> Any:
        """``value`` with a mark before and after each special token that its text spells."""
        if isinstance(value, str):
            value = value.replace(_MARK, "\N{REPLACEMENT CHARACTER}")
            mark = rf"{_MARK}\g<0>{_MARK}"
            return value if self._special is None else self._special.sub(mark, value)
        if isinstance(value, Mapping):
            return {key: self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list | tuple) else value


def load_template(folder: Path, special: Iterable[str]) -> ChatTemplate | None:
    """The chat template in ``folder``, or None if it has none.

    Raises:
      ConfigError: a file is damaged; names it.
    """
    named = [content for name in NAMING if (content := _object(folder / name))]
    sources = _sources(folder)
    if not sources:
        return None
    check("default" in sources, "chat_template", sorted(sources), "must have one called default")
    names = {}
    for name in _NAMES:
        value = next((v for content in named if (v := named_token(content, name))), None)
        if isinstance(value, str):
            names[name] = value
    return ChatTemplate(sources, names, special)


def _sources(folder: Path) -> dict[str, str]:
    """Name → text of each template; a file of its own has precedence over tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise ConfigError(f"file={str(path)!r}: must be UTF-8: {error}") from None
    for name in (NAMING[0], "chat_template.json"):
        value = _object(folder / name).get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if value is not None:
            requirement = f"must be text, or a list of objects with name and template, in {name}"
            valid = isinstance(value, list) and all(
                isinstance(v, dict)
                and isinstance(v.get("name"), str)
                and isinstance(v.get("template"), str)
                for v in value
            )
            check(valid, "chat_template", value, requirement)
            return {v["name"]: v["template"] for v in value}
    return {}


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    check(isinstance(content, dict), "file", str(path), "must hold an object")
    return content


class _Renderer:
    """The process of `render.py`; it is ended, and started again, if a template takes too long."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of the template ``source``; raises `ConfigError`."""
        with self._lock:
            answer = self._ask([source, variables])
        if "error" in answer:
            reason = " ".join(answer["error"].split())[:300]
            raise ConfigError(f"messages: the chat template cannot be rendered: {reason}")
        return answer["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, question: Any) -> dict[str, Any]:
        line = json.dumps(question).encode() + b"\n"
        if self._process is None or self._process.poll() is not None:
            self._start()
        answer = self._exchange(line, _SECONDS)
        if answer is None:
            self._end()
            return {"error": f"takes more than {_SECONDS:g} s or too much memory"}
        return json.loads(answer)

    def _start(self) -> None:
        self._end()
        script = Path(__file__).with_name("render.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        ready = self._exchange(json.dumps(["", {}]).encode() + b"\n", _START_SECONDS)
        if ready is None:
            self._end()
            raise ConfigError("messages: the process that renders chat templates does not start")

    def _exchange(self, line: bytes, seconds: float) -> bytes | None:
        """The line that answers ``line``, or None where the process ends or time is over."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        over = threading.Timer(seconds, process.kill)  # ends a write and a read that wait
        over.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline() or None
        except OSError:
            return None
        finally:
            over.cancel()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):  # a line that it did not read
                self._process.communicate()
            self._process = None
