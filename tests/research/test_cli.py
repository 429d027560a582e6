import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from research.cli import main


@pytest.fixture
def ablate(make_package, machine, tmp_path):
    package = make_package()
    results = tmp_path / "results"

    def call(command, *more):
        where = [] if command.startswith("-") else [f"--results={results}"]
        if command == "run":
            where += ["branch/wide", f"--workdir={tmp_path / 'work'}"]
        return main([command, *where, *more], package=package)

    call.results, call.work, call.package = results, tmp_path / "work", package
    return call


def test_run_record_report(ablate, capsys):
    assert ablate("run", "--record") == 0
    printed = capsys.readouterr().out
    assert "SUPPORTED: Wide has a lower loss" in printed
    assert "NOT SUPPORTED: Tuning helps by more than 1" in printed
    assert {p.name for p in ablate.work.glob("*.*")} == {"summary.json", "table.md", "figure.png"}
    record = json.loads((ablate.results / "branch/wide-cpu.json").read_text())
    assert [c["status"] for c in record["claims"]] == ["supported", "supported", "not supported"]
    assert record["environment"]["device"] == "pocket calculator"
    assert record["seeds"] == [0, 1, 2] and record["config"]["model"]["width"] == 4
    assert (ablate.results / "branch/wide-cpu.png").read_bytes().startswith(b"\x89PNG")

    assert ablate("report", "--check") == 1
    assert ablate("report") == 0
    assert ablate("report", "--check") == 0
    boards = [(ablate.results / name).read_bytes() for name in ("README.md", "index.html")]
    assert ablate("report") == 0
    assert boards == [(ablate.results / n).read_bytes() for n in ("README.md", "index.html")]
    page = boards[1].decode()
    assert "&lt;Wide&gt; &amp; narrow" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert "Table 1: 2 \\| 1" in boards[0].decode()
    _assert_balanced(page)
    capsys.readouterr()
    assert ablate("list") == 0
    assert "better: supported (cpu)" in capsys.readouterr().out


def _assert_balanced(page):
    class Checker(HTMLParser):
        stack = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "img"):
                self.stack.append(tag)

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.stack == []


def test_a_failed_unit_exits_1_and_is_not_recorded(ablate, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_TRAP", "wide/0/0/fail")
    assert ablate("run", "--record") == 1
    captured = capsys.readouterr()
    assert "wide seed 0 failed: RuntimeError: lost" in captured.err
    assert "NOT RUN: Wide has a lower loss (arm 'wide' seed 0 is not finished" in captured.out
    assert not ablate.results.exists()


def test_interrupt_exits_130_and_goes_on(ablate, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_TRAP", "wide/0/1/interrupt")
    assert ablate("run") == 130
    monkeypatch.delenv("FAKE_TRAP")
    assert ablate("run") == 0
    assert "narrow, seed 0: finished before" in capsys.readouterr().out


def test_list_units(ablate, capsys):
    assert ablate("run", "--list-units", "--arms=tuned", "--seeds=2") == 0
    assert capsys.readouterr().out == "wide seed 2: new\ntuned seed 2: new\n"
    assert not ablate.work.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rum"], "COMMAND='rum': did you mean 'run'?"),
        (["run", "branch/wyde"], "did you mean 'branch/wide'?"),
        (["run", "branch/wide", "--scale=cpuu"], "did you mean 'cpu'?"),
        (["run", "branch/wide", "--arms=wid"], "did you mean 'wide'?"),
        (["run", "branch/wide", "--seeds=a"], "--seeds=a: must be numbers"),
        (["run", "branch/wide", "--seeds=-1"], "seeds=[-1]"),
        (["run", "branch/wide", "--config.stepz=1"], "did you mean 'steps'?"),
        (["run", "branch/wide", "--record", "--seeds=0"], "--record: needs all arms and seeds"),
        (["run", "branch/wide", "--record", "--config.noise=2"], "no --config overrides"),
        (["report", "--config.x=1"], "only `ablate run` takes overrides"),
        ([], "COMMAND"),
    ],
)
def test_requests_that_cannot_be_served(ablate, capsys, arguments, message):
    assert main(arguments, package=ablate.package) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_answers_without_jax():
    code = (
        "import sys\nfrom research.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ablate run architecture/gqa --scale=smoke" in done.stdout


def test_an_empty_board_is_still_a_board(ablate):
    assert ablate("report") == 0
    assert "no records yet" in (ablate.results / "README.md").read_text()
