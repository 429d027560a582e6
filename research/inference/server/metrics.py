"""Counts and times in Prometheus's text format, version 0.0.4."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds


class Histogram:
    """How many values are at most each of `_BOUNDS`, their sum and their number."""

    def __init__(self):
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server counts itself; the engine has counts of its own."""

    def __init__(self):
        self.answers: collections.Counter[tuple[str, int]] = collections.Counter()
        self.disconnects = 0
        self.first_token, self.whole_answer = Histogram(), Histogram()

    def text(self, engine: Any, is_draining: bool) -> str:
        """All metrics; those of ``engine`` are read while it runs."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: Mapping[str, float] | float) -> None:
            lines.extend((f"# HELP ablate_{name} {about}", f"# TYPE ablate_{name} {kind}"))
            each = values.items() if isinstance(values, Mapping) else [("", values)]
            lines.extend(f"ablate_{name}{labels} {value}" for labels, value in each)

        by_status = {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self.answers.items())
        }
        add("answers_total", "counter", "Answers by path and status.", by_status)
        add("disconnects_total", "counter", "Clients that left early.", self.disconnects)
        add("draining", "gauge", "1 while no new request is taken.", int(is_draining))
        add("samples_running", "gauge", "Samples that have a slot.", engine.running)
        add("samples_waiting", "gauge", "Samples that wait for a slot.", engine.waiting)
        add("slots", "gauge", "Samples that run at a time, at most.", engine.config.slots)
        stats = engine.stats
        add("steps_total", "counter", "Steps of the engine.", stats.steps)
        add("step_seconds_total", "counter", "Seconds in steps.", stats.seconds)
        add("prompt_tokens_total", "counter", "Prompt tokens that were computed.", stats.prefilled)
        add("shared_tokens_total", "counter", "Prompt tokens of kept prefixes.", stats.shared)
        add("generated_tokens_total", "counter", "New tokens.", stats.generated)
        add("preemptions_total", "counter", "Samples that lost their memory.", stats.preemptions)
        if engine.pages is not None:
            pages = engine.pages
            add("pages", "gauge", "Pages of the cache.", pages.count)
            add("pages_free", "gauge", "Pages that nothing holds.", pages.free)
        for name, histogram, about in (
            ("first_token_seconds", self.first_token, "From a request to its first token."),
            ("answer_seconds", self.whole_answer, "From a request to the end of its answer."),
        ):
            lines += [f"# HELP ablate_{name} {about}", f"# TYPE ablate_{name} histogram"]
            lines += histogram.lines(f"ablate_{name}")
        return "\n".join(lines) + "\n"
