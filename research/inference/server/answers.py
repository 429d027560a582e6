"""Answers in OpenAI's forms, whole and as streams, from the engine's events."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from research.inference.engine import Event
from research.inference.server.requests import Call
from research.inference.server.text import ServedTokenizer, TokenText
from research.inference.server.tools import ToolCall, ToolParser
from research.inference.server.worker import PromptLogprobs

Top = Sequence[tuple[int, float]]
_FINISH = {"stop": "stop", "length": "length"}


class Answer:
    """What completions and chats have in common: ids, and the counts of tokens."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, call: Call, tokenizer: ServedTokenizer, model: str):
        self._call, self._tokenizer = call, tokenizer
        self._new = 0
        self._named = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def parts(self, item: Event | PromptLogprobs) -> Iterator[dict[str, Any]]:
        """The choices of a chunk after ``item``."""
        raise NotImplementedError

    def whole(self, items: Sequence[Event | PromptLogprobs]) -> dict[str, Any]:
        """The answer that is not streamed."""
        raise NotImplementedError

    def usage(self) -> dict[str, int]:
        prompt = self._call.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._new,
            "total_tokens": prompt + self._new,
        }

    def _count(self, event: Event) -> None:
        self._new += event.token is not None and self._call.new_tokens

    def _parts_of_choices(
        self, items: Sequence[Event | PromptLogprobs], count: int
    ) -> list[list[dict[str, Any]]]:
        """The parts of each of ``count`` choices, in order."""
        of_choices: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        for item in items:
            for part in self.parts(item):
                of_choices[part["index"]].append(part)
        return of_choices

    def _whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._named,
            "object": self.whole_object,
            "choices": list(choices),
            "usage": self.usage(),
        }

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One chunk of a stream."""
        named = {**self._named, "object": self.chunk_object, "choices": list(choices)}
        return {**named, "usage": None} if self._call.fields.include_usage else named

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream, where it was asked for."""
        return {**self.chunk([]), "usage": self.usage()}

    def _reason(self, event: Event) -> str | None:
        if event.finish_reason is None:
            return None
        return _FINISH.get(event.finish_reason, "stop") if self._call.new_tokens else "length"


class CompletionAnswer(Answer):
    """The answer to ``/v1/completions``: choice ``prompt · n + sample`` for each."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call, tokenizer: ServedTokenizer, model: str):
        super().__init__(call, tokenizer, model)
        count = len(call.requests) * call.fields.samples
        self._offset = [0] * count  # characters before the next token
        self._echoed = [not call.echo] * count
        self._prompts: dict[int, PromptLogprobs] = {}

    def parts(self, item: Event | PromptLogprobs) -> Iterator[dict[str, Any]]:
        if isinstance(item, PromptLogprobs):
            self._prompts[item.prompt] = item
            return
        self._count(item)
        index = item.request * self._call.fields.samples + item.index
        if not self._echoed[index]:
            self._echoed[index] = True
            yield self._echo(index, item.request)
        new = self._call.new_tokens
        logprobs = None
        if self._call.logprobs is not None:
            given = item.token is not None and new
            tokens = [(item.token, item.logprob, item.top)] if given else []
            logprobs = self._logprobs(index, tokens)
        text = item.text if new else ""
        reason = self._reason(item)
        if text or reason or (logprobs and logprobs["tokens"]):
            yield self._choice(index, text, logprobs, reason)

    def whole(self, items: Sequence[Event | PromptLogprobs]) -> dict[str, Any]:
        choices = []
        for index, own in enumerate(self._parts_of_choices(items, len(self._offset))):
            logprobs = None
            if self._call.logprobs is not None:
                names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                logprobs = {n: [v for part in own for v in part["logprobs"][n]] for n in names}
            text = "".join(part["text"] for part in own)
            reason = next((p["finish_reason"] for p in own if p["finish_reason"]), None)
            choices.append(self._choice(index, text, logprobs, reason))
        return self._whole(choices)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _echo(self, index: int, prompt: int) -> dict[str, Any]:
        """The prompt itself, as the beginning of the answer."""
        tokens = self._call.requests[prompt].tokens
        logprobs = None
        if self._call.logprobs is not None:
            of = self._prompts[prompt]
            listed = list(zip(tokens, of.logprobs, of.top, strict=True))
            logprobs = self._logprobs(index, listed)
        return self._choice(index, self._tokenizer.decode(tokens), logprobs, None)

    def _logprobs(
        self, index: int, tokens: Sequence[tuple[Any, float | None, Top]]
    ) -> dict[str, list]:
        """``top_logprobs`` has the token itself too; with logprobs=0 it has nothing else."""
        listed: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for token, logprob, top in tokens:
            text = self._tokenizer.text_of(token)
            listed["tokens"].append(_name(text))
            listed["token_logprobs"].append(logprob)
            likeliest = None
            if logprob is not None:
                likeliest = {_name(self._tokenizer.text_of(t)): value for t, value in top}
                likeliest.setdefault(listed["tokens"][-1], logprob)
            listed["top_logprobs"].append(likeliest)
            listed["text_offset"].append(self._offset[index])
            self._offset[index] += len(text.shown)
        return listed


class ChatAnswer(Answer):
    """The answer to ``/v1/chat/completions``: a message for each sample, or its parts."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, call: Call, tokenizer: ServedTokenizer, model: str):
        super().__init__(call, tokenizer, model)
        samples, use = call.fields.samples, call.tool_use
        self._begun = [False] * samples
        self._calls = [0] * samples
        self._parsers: list[ToolParser] | None = None
        if use is not None and use.form is not None:
            self._parsers = [ToolParser(use.form, use.names) for _ in range(samples)]

    def parts(self, item: Event | PromptLogprobs) -> Iterator[dict[str, Any]]:
        if isinstance(item, PromptLogprobs):
            return
        self._count(item)
        index, new = item.index, self._call.new_tokens
        logprobs = None
        if self._call.logprobs is not None and item.token is not None and new:
            logprobs = self._logprob(item.token, item.logprob)
            logprobs["top_logprobs"] = [self._logprob(*likely) for likely in item.top]
            logprobs = {"content": [logprobs], "refusal": None}
        deltas = list(self._deltas(item, item.text if new else ""))
        if not self._begun[index]:
            self._begun[index] = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        reason = self._reason(item)
        if reason == "stop" and self._calls[index]:
            reason = "tool_calls"
        if not deltas and (reason or logprobs):
            deltas.append({})
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            yield {
                "index": index,
                "delta": delta,
                "logprobs": logprobs if last else None,
                "finish_reason": reason if last else None,
            }

    def whole(self, items: Sequence[Event | PromptLogprobs]) -> dict[str, Any]:
        choices = []
        for index, own in enumerate(self._parts_of_choices(items, self._call.fields.samples)):
            deltas = [part["delta"] for part in own]
            content = "".join(delta.get("content") or "" for delta in deltas)
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                message["content"] = content or None
                message["tool_calls"] = [
                    {name: call[name] for name in ("id", "type", "function")} for call in calls
                ]
            logprobs = None
            if self._call.logprobs is not None:
                listed = [entry for p in own if p["logprobs"] for entry in p["logprobs"]["content"]]
                logprobs = {"content": listed, "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": next(
                        (p["finish_reason"] for p in own if p["finish_reason"]), None
                    ),
                }
            )
        return self._whole(choices)

    def _deltas(self, event: Event, text: str) -> Iterator[dict[str, Any]]:
        if self._parsers is None:
            found: list[str | ToolCall] = [text] if text else []
        else:
            parser = self._parsers[event.index]
            found = parser.push(text)
            if event.finish_reason is not None:
                found += parser.finish()
        for piece in found:
            if isinstance(piece, str):
                yield {"content": piece}
                continue
            number = self._calls[event.index]
            self._calls[event.index] += 1
            function = {"name": piece.name, "arguments": piece.arguments}
            called = {"index": number, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            yield {"tool_calls": [{**called, "function": function}]}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.text_of(token)
        return {"token": text.text, "logprob": logprob, "bytes": list(text.raw)}


def _name(token: TokenText) -> str:
    """The text of a token; its bytes, as OpenAI writes them, if they are no whole characters."""
    if token.text.encode() == token.raw:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
