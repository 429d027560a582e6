"""Without a terminal or ipywidgets, progress is a line now and then."""

import pytest
from rich.console import Console

from research.training import progress
from research.training.progress import bar, describe, lines


def test_describe_shows_what_there_is():
    assert describe({}) == ""
    shown = describe({"loss": 2.3456, "tokens_per_second": 12345.6, "mfu": 0.414})
    assert shown == "loss 2.346 · 12,346 tokens/s · 41% MFU"


def test_lines_come_first_last_and_seldom(capsys):
    update = lines(every=1000.0)
    for step in range(1, 101):
        update(step, 100, {"loss": 1.0} if step > 1 else {})
    assert capsys.readouterr().out == "step 1/100\nstep 100/100 · loss 1.000\n"


def test_bar_without_a_terminal_is_lines(capsys):
    with bar(2) as update:
        update(1, 2, {})
        update(2, 2, {"loss": 1.0})
    assert capsys.readouterr().out == "step 1/2\nstep 2/2 · loss 1.000\n"


@pytest.mark.parametrize("widgets", [None, "found"])
def test_bar_in_a_notebook_requires_ipywidgets(widgets, monkeypatch, capsys):
    monkeypatch.setattr(progress, "find_spec", lambda name: widgets)
    console = Console(force_jupyter=True, force_terminal=False)
    monkeypatch.setattr(progress, "Console", lambda: console)
    shown = []
    monkeypatch.setattr(progress.Progress, "start", lambda self: shown.append(self))
    monkeypatch.setattr(progress.Progress, "stop", lambda self: None)
    with bar(2) as update:
        update(2, 2, {"loss": 1.0})
    printed = capsys.readouterr().out
    assert (len(shown), "step 2/2" in printed) == ((1, False) if widgets else (0, True))
