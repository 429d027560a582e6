"""The table of a run on a terminal."""

import io

from rich.console import Console

from research.ablation.summary import arms_tables, markdown


def shown(metrics):
    summary = dict(experiment="branch/name", scale="cpu", metrics=metrics)
    console = Console(file=io.StringIO(), width=100)
    for table in arms_tables(summary):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text, label):
    [line] = [line for line in text.splitlines() if f"│ {label} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def spread(mean):
    return dict(mean=mean, low=None, high=None, seeds=1)


def test_the_fewer_of_arms_and_metrics_are_columns():
    arms = {arm: {"loss": spread(value)} for arm, value in (("plain", 1.5), ("other", 2.5))}
    assert row(shown(arms), "other") == ["other", "2.5"]
    many = {
        "plain": {"loss": spread(1.5), "time": spread(3.0), "bytes": spread(7.0)},
        "other": {"loss": spread(2.5), "bytes": spread(8.0)},
    }
    text = shown(many)
    assert row(text, "loss") == ["loss", "1.5", "2.5"]
    assert row(text, "time") == ["time", "3", ""]  # the second arm has none
    assert row(text, "bytes") == ["bytes", "7", "8"]


def test_arms_that_measure_other_things_have_their_own_table():
    metrics = {
        "copy": {"loss": spread(1.0)},
        "slow": {"seconds": spread(2.0)},
        "both": {"loss": spread(3.0), "bytes": spread(4.0)},
        "large": {"bytes": spread(5.0)},
    }
    text = shown(metrics)
    assert row(text, "slow") == ["slow", "2"]
    assert row(text, "both") == ["both", "3", "4"]
    assert row(text, "large") == ["large", "", "5"]
    summary = dict(title="", paper="", matched="", scale="cpu", claims=[], metrics=metrics)
    assert "| arm | seconds |\n|---|---:|\n| slow | 2 |\n" in markdown(summary)
