import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest

from research import cli
from research.ablation import summary
from research.cli import main
from research.cli.errors import line
from tests.research.conftest import SOURCE


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
    (ablate.results / "branch/.wide-cpu.77.json").write_text("{")  # of a process that was killed
    assert ablate("report") == 0
    assert boards == [(ablate.results / n).read_bytes() for n in ("README.md", "index.html")]
    page = boards[1].decode()
    assert "&lt;Wide&gt; &amp; narrow" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert "Table 1: 2 \\| 1" in boards[0].decode()
    _assert_balanced(page)
    capsys.readouterr()
    assert ablate("list") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("branch/wide (cpu, 1 min)\n") and "better: supported (cpu)" in printed


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


def test_claims_of_arms_left_out_are_counted_and_not_read_out(ablate, capsys):
    assert ablate("run", "--arms=wide") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SUPPORTED: Wide holds at most 64 bytes (64 is ≤ 64; paper: no number)" in lines
    assert not [line for line in lines if line.startswith("NOT RUN")]
    assert "not asked for: claims that require arms which --arms leaves out: 2" in lines
    # the table has them all
    table = (ablate.work / "table.md").read_text()
    assert "Tuning helps by more than 1 | none | not asked for" in table and "not run" not in table


def test_smoke_scale_decides_nothing(ablate, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_TRAP", "tuned/0/0/fail")
    assert ablate("run", "--scale=smoke") == 1
    printed = capsys.readouterr().out
    assert printed.count("NOT DECIDED AT SMOKE SCALE: Wide ") == 2
    assert "NOT RUN: Tuning helps" in printed and "SUPPORTED" not in printed
    claims = json.loads((ablate.work / "summary.json").read_text())["claims"]
    assert [claim["status"] for claim in claims] == [summary.NOT_DECIDED] * 2 + ["not run"]
    table = (ablate.work / "table.md").read_text()
    assert summary.PLUMBING in table and "supported" not in table
    assert ablate("run", "--scale=smoke", "--record") == 2
    assert "--record: smoke scale decides nothing" in capsys.readouterr().err
    assert not ablate.results.exists()


def test_interrupt_exits_130_and_goes_on(ablate, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_TRAP", "wide/0/1/interrupt")
    assert ablate("run") == 130
    monkeypatch.delenv("FAKE_TRAP")
    assert ablate("run") == 0
    assert "narrow, seed 0: finished before" in capsys.readouterr().out


def test_units_listed_run_apart_and_are_the_whole(ablate, capsys):
    assert ablate("run", "--list-units", "--arms=tuned", "--seeds=2") == 0
    assert capsys.readouterr().out == "--arms=tuned --seeds=2\n"
    assert not ablate.work.exists()
    assert ablate("run", "--list-units") == 0
    lines = capsys.readouterr().out.splitlines()
    # what starts from an arm is on its line
    assert lines == [
        f"--arms={arms} --seeds={seed}" for seed in (0, 1, 2) for arms in ("narrow", "wide,tuned")
    ]
    for options in reversed(lines):
        assert ablate("run", *options.split()) == 0
    assert ablate("run", "--list-units") == 0
    capsys.readouterr()
    assert ablate("run") == 0
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 9 and "SUPPORTED: Wide has a lower" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rum"], "COMMAND='rum': did you mean 'run'?"),
        (["run", "branch/wyde"], "did you mean 'branch/wide'?"),
        (["run", "branch/wide", "--scale=cpuu"], "did you mean 'cpu'?"),
        (["run", "branch/wide", "--arms=wid"], "did you mean 'wide'?"),
        (["run", "branch/wide", "--seeds=a"], "--seeds=a: must be comma-separated"),
        (["run", "branch/wide", "--seeds=-1"], "seeds=[-1]"),
        (["run", "branch/wide", "--profile=a:b"], "--profile=a:b: must be FIRST:END, e.g. 10:15"),
        (["run", "branch/wide", "--profile=3"], "--profile=3: must be FIRST:END"),
        (["run", "branch/wide", "--profile=-1:3"], "--profile=-1:3: must be FIRST:END"),
        (["run", "branch/wide", "--workdir=gs://a/b"], "gs://a/b: must be a folder"),
        (["run", "branch/wide", "--config.stepz=1"], "did you mean 'steps'?"),
        (["run", "branch/wide", "--record", "--seeds=0"], "--record: requires all arms and seeds"),
        (["run", "branch/wide", "--record", "--config.noise=2"], "no --config overrides"),
        (["report", "--config.x=1"], "only `ablate run` and `plan` take overrides"),
        (["run", "branch/wide", "--arms="], "--arms=: must not be empty"),
        (["run", "branch/wide", "--arms", ""], "--arms=: must not be empty"),
        (["run", "branch/wide", "--seeds="], "--seeds=: must not be empty"),
        (["run", "branch/wide", "--workdir="], "--workdir=: must not be empty"),
        (["run", "branch/wide", "--arms=wide,"], "arm='': known: narrow, wide, tuned"),
        (["run", ""], "NAME=: must not be empty"),
        (["bench", "ssd", "--cases="], "--cases=: must not be empty"),
        (["plan", "branch/wide", "--arms="], "--arms=: must not be empty"),
        (["list", "--results=/nope"], "--results='/nope': must be an existing folder"),
        (["report", "--results=/nope"], "--results='/nope': must be an existing folder"),
        (["report", "--check", "--results=/nope"], "--results='/nope': must be an existing folder"),
        ([], "COMMAND"),
    ],
)
def test_requests_that_cannot_be_served(ablate, capsys, arguments, message):
    assert main(arguments, package=ablate.package) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


TRAINS = (
    SOURCE[: SOURCE.index("def run")]
    + """
from research.training import Preempted

def run(unit):
    if os.environ.get("FAKE_TRAP") == "preempted":
        raise Preempted
    from research.training.goodput import Clock
    from research.training.profile import Trace
    trace = Trace(unit.profile, unit.config.steps, unit.workdir, Clock())
    trace.begin(1, None)
    trace.close()
    return {"loss": 1.0, "bytes": 1}
"""
)


def test_steps_to_trace_reach_the_units(make_package, machine, tmp_path, capsys, monkeypatch):
    # JAX's own crashes a process that has loaded the TPU's compiler, as other tests do
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: Path(folder).mkdir())
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    command = ["run", "branch/trains", "--seeds=0", "--arms=narrow", f"--workdir={tmp_path}"]
    package = make_package(trains=TRAINS)
    assert main([*command, "--profile=2:9"], package=package) == 2
    assert capsys.readouterr().err == (
        "ablate: arm 'narrow': profile='2:9': must be FIRST:END with 1 ≤ FIRST < END ≤ 4\n"
    )
    assert not list(tmp_path.glob("narrow/seed0/*"))
    assert main([*command, "--profile=1:2"], package=package) == 0
    captured = capsys.readouterr()
    assert "trace" not in captured.err
    assert f"trace of narrow, seed 0: {tmp_path / 'narrow/seed0/profile'}\n" in captured.out
    assert (tmp_path / "narrow/seed0/profile").is_dir()
    assert "profile" not in (tmp_path / "narrow/seed0/unit.json").read_text()
    # nothing about the unit has changed
    assert main(command, package=package) == 0
    assert "narrow, seed 0: finished before" in capsys.readouterr().out


def test_a_unit_without_a_trace_is_named(ablate, capsys):
    assert ablate("run", "--arms=narrow", "--seeds=0", "--profile=1:2") == 0
    assert "ablate: narrow seed 0 has no trace" in capsys.readouterr().err


READS = (
    SOURCE[: SOURCE.index("def run")]
    + """
def run(unit):
    from layers.mlp import MlpConfig
    from research.data import DataConfig
    from research.training.workdir import begin, record_changed_data
    data = DataConfig(source="files", paths=(str(unit.workdir.parents[1] / "a.txt"),))
    parts = dict(model=MlpConfig(4), data=data, training=MlpConfig(4))
    changed = begin(unit.workdir, parts, 0, True, accept_changed_data=unit.accept_changed_data)
    if changed:
        record_changed_data(unit.workdir, data, 7, changed)
    (unit.workdir / "metrics.jsonl").write_text("{}")
    if os.environ.get("FAKE_TRAP") == str(unit.seed):
        raise KeyboardInterrupt
    return {"loss": 1.0, "bytes": 1}
"""
)


def test_changed_data_is_accepted_by_name_and_in_the_record(
    make_package, machine, tmp_path, capsys, monkeypatch
):
    package, text = make_package(reads=READS), tmp_path / "a.txt"
    command = ["run", "branch/reads", "--seeds=0,1", "--arms=narrow", f"--workdir={tmp_path}"]
    text.write_text("one")
    monkeypatch.setenv("FAKE_TRAP", "1")
    assert main(command, package=package) == 130
    monkeypatch.delenv("FAKE_TRAP")
    text.write_text("one more")
    finished = (tmp_path / "narrow/seed0/data.json").read_bytes()
    capsys.readouterr()
    assert main(command, package=package) == 2
    error = capsys.readouterr().err
    assert "arm 'narrow': data.source='files': must be as when" in error and error.count("\n") == 1
    assert "a.txt: 3 bytes, sha256 " in error and "--accept-changed-data" in error
    assert main([*command, "--accept-changed-data"], package=package) == 0
    assert finished == (tmp_path / "narrow/seed0/data.json").read_bytes()
    after, unlike = json.loads((tmp_path / "summary.json").read_text())["data_changes"]
    assert after.startswith("narrow, seed 1, after step 7: a.txt: 3 bytes, sha256 ")
    assert unlike.startswith("narrow, seed 1, unlike narrow, seed 0: a.txt: 3 bytes, sha256 ")
    assert f"Other data: {unlike}" in (tmp_path / "table.md").read_text()
    assert f"ablate: other data: {after}\n" in capsys.readouterr().err


def test_a_flag_for_changed_data_that_accepts_nothing_says_so(ablate, capsys):
    assert ablate("run", "--arms=narrow", "--seeds=0", "--accept-changed-data") == 0
    assert "--accept-changed-data: no finished unit had changed data" in capsys.readouterr().err
    assert "data_changes" not in json.loads((ablate.work / "summary.json").read_text())


def test_a_training_that_was_stopped_exits_143(make_package, tmp_path, capsys, monkeypatch):
    """So that whoever started it knows that it is not done."""
    monkeypatch.setenv("FAKE_TRAP", "preempted")
    command = ["run", "branch/trains", f"--workdir={tmp_path / 'trains'}"]
    assert main(command, package=make_package(trains=TRAINS)) == 143
    assert "the same command continues" in capsys.readouterr().err


def test_help_answers_without_jax():
    code = (
        "import sys\nfrom research.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ablate run architecture/gqa --scale=smoke" in done.stdout


def test_only_training_imports_torch():
    """tensorboardX imports it if it is installed, which takes seconds."""
    code = (
        "import sys\nfrom research.cli import main\nmain(['list'])\n"
        "assert 'research.training' in sys.modules\n"
        "assert not {'tensorboardX', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "offered, asked, started_with",
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.cpu.x=1", "glibc.cpu.x=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_the_process_starts_again_only_where_huge_pages_are_on_request(
    tmp_path, monkeypatch, offered, asked, started_with
):
    setting = tmp_path / "enabled"
    if offered is not None:
        setting.write_text(offered + "\n")
    monkeypatch.setattr(cli, "_HUGE_PAGES", setting)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if asked is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", asked)
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    cli._with_huge_pages()
    assert [environment["GLIBC_TUNABLES"] for _, _, environment in started] == [
        text for text in [started_with] if text
    ]


@pytest.mark.skipif(
    not cli._HUGE_PAGES.exists() or "[madvise]" not in cli._HUGE_PAGES.read_text(),
    reason="huge pages are not on request here",
)
def test_started_again_it_is_the_same_command(tmp_path):
    code = (
        "import os, sys\nfrom research.cli import main\n"
        "code = main()\nprint(code, os.getpid(), os.environ['GLIBC_TUNABLES'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    words = [sys.executable, "-c", code, "report", f"--results={tmp_path}"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=120)
    # the same process, so that signals to it arrive
    assert printed.splitlines()[-1] == f"0 {process.pid} glibc.malloc.hugetlb=1"
    assert (tmp_path / "README.md").exists()


def test_an_empty_board_is_still_a_board(ablate):
    ablate.results.mkdir()
    assert ablate("report") == 0
    assert "no records yet" in (ablate.results / "README.md").read_text()


DAMAGES = (
    "", "[1, 2]", '{"experiment": "branch/wide"}', "{", "\xff", "null", ["claims"], ["seconds"],
    ["claims", 0, "status"], ["claims", 0, "seeds"], ["metrics", "wide"], ["seeds", 0],
)  # fmt: skip


def test_a_damaged_record_is_named_by_every_command(ablate, capsys):
    assert ablate("run", "--record") == 0
    path = ablate.results / "branch/wide-cpu.json"
    whole = path.read_text()
    for damage in DAMAGES:
        if isinstance(damage, str):
            path.write_bytes(damage.encode("latin-1"))
        else:
            record = value = json.loads(whole)
            for key in damage[:-1]:
                value = value[key]
            value[damage[-1]] = "absent"
            path.write_text(json.dumps(record))
        capsys.readouterr()
        for command in (["list"], ["report"], ["report", "--check"]):
            assert ablate(*command) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"ablate: file='{path}': ") and error.count("\n") == 1, error
            assert error.endswith(
                "; restore it, or delete it and run the experiment with --record\n"
            )


@pytest.mark.parametrize("name", ["unit.json", "result.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"{}", b"[]", b"null", b"3", b'{"config": 3, "metrics": 3}',
     b'{"arm": "wide", "seed": 0, "seconds": 1, "metrics": {"loss": {}}}'],
)  # fmt: skip
def test_damaged_files_of_a_unit_are_named_before_anything_runs(ablate, capsys, name, content):
    path = ablate.work / "wide/seed0" / name
    path.parent.mkdir(parents=True)
    valid = dict(arm="wide", seed=0, seconds=1.0, metrics=dict(loss=1.0), config={})
    for other in ("unit.json", "result.json"):
        (path.parent / other).write_text(json.dumps(valid))
    path.write_bytes(content)
    assert ablate("run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "to run the unit again" in error
    assert error.startswith(f"ablate: file='{path}': ")
    assert not (ablate.work / "narrow").exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (FileExistsError(17, "x", "a/b"), "a/b: File exists: remove it or choose another path"),
        (PermissionError(13, "x", "a"), "a: Permission denied: use a path that this user may read"),
        (IsADirectoryError(21, "x", "a"), "a: Is a directory: a file is required: remove the fold"),
        (NotADirectoryError(20, "x", "a"), "a: Not a directory: a part of the path is a file"),
        (OSError(28, "x"), "No space left on device: free space; then the same command continues"),
        (OSError(30, "x", "a"), "a: Read-only file system: choose a path on a disk that can be"),
        (OSError(36, "x", "a"), "a: File name too long: choose a shorter name"),
        (OSError(5, "x", "a"), "a: Input/output error: check the disk or choose another path"),
        (OSError(18, "x", "a", None, "b"), "a → b: Invalid cross-device link: check the disk"),
        (OSError("as it is"), "as it is"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_says_what_to_do(error, said):
    assert line(error).startswith(said) and "\n" not in line(error)


def test_a_path_that_cannot_be_written_is_one_line(ablate, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300)):
        assert main(["run", "branch/wide", f"--workdir={folder}"], package=ablate.package) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Errno" not in error and ": " in error
