"""The TPU script calls `gcloud` as documented, and hosts would run what it sends them."""

import shlex

import pytest

from tests.research.launch.conftest import LAUNCH, call

# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm: those used here
FLAGS = {
    "create": {"--zone", "--accelerator-type", "--version"},
    "ssh": {"--zone", "--worker", "--command"},
    "scp": {"--zone", "--worker"},
    "delete": {"--zone", "--quiet"},
}
RECORD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$RECORD" && echo >>"$RECORD"
"""
# stands in for pip, which would build the wheel
PYTHON3 = """#!/usr/bin/env bash
while [ "$1" != --wheel-dir ]; do shift; done
touch "$2/ablate-9.9.9-py3-none-any.whl"
"""


@pytest.fixture
def script(stubs, tmp_path):
    def run(*words, **variables):
        told = stubs(1, gcloud=RECORD, python3=PYTHON3)
        told |= {"RECORD": str(tmp_path / "record"), **variables}
        done = call(["bash", LAUNCH / "tpu_vm.sh", *words], told)
        record = tmp_path / "record"
        # printf quotes lines as $'…', which only a shell reads back
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [unquoted(line) for line in lines]

    return run


def unquoted(line: str) -> list[str]:
    done = call(["bash", "-c", f"printf '%s\\0' {line}"], {})
    return done.stdout.split("\0")[:-1]


def parsed(words):
    """Command, positional words and flags of a call of `gcloud`, if it is one as documented."""
    assert words[:3] == ["compute", "tpus", "tpu-vm"]
    command, rest = words[3], words[4:]
    flags = dict(word.partition("=")[::2] for word in rest if word.startswith("-"))
    assert set(flags) <= FLAGS[command], words
    assert flags["--zone"] == "us-east5-a"
    return command, [word for word in rest if not word.startswith("-")], flags


def test_create(script):
    done, calls = script("create", ZONE="us-east5-a", STORE="10.0.0.2:/runs", TPU="mine")
    assert done.returncode == 0, done.stderr
    create, copy, setup = (parsed(words) for words in calls)
    assert create[:2] == ("create", ["mine"])
    assert create[2]["--accelerator-type"] == "v5litepod-16"
    assert create[2]["--version"] == "v2-alpha-tpuv5-lite"
    command, (wheel, to), flags = copy
    assert command == "scp" and wheel.endswith("/ablate-9.9.9-py3-none-any.whl") and to == "mine:"
    assert flags["--worker"] == setup[2]["--worker"] == "all"
    sent = setup[2]["--command"]
    assert call(["bash", "-n", "-c", sent], {}).returncode == 0
    assert "mount -t nfs '10.0.0.2:/runs' /runs" in sent
    assert sent.startswith("set -e\n"), "a host that was not set up would only show later"


def test_run_sends_its_words_as_they_are(script, tmp_path):
    words = ["architecture/gqa", "--config.data.source=it's $HOME", "--workdir=/runs/gqa"]
    done, calls = script("run", *words, ZONE="us-east5-a")
    assert done.returncode == 0, done.stderr
    ((command, (name,), flags),) = (parsed(words) for words in calls)
    assert (command, name, flags["--worker"]) == ("ssh", "ablate", "all")
    # what a host's shell makes of it
    folder = tmp_path / "ablate" / "bin"
    folder.mkdir(parents=True)
    (folder / "ablate").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$ABLATE_DISTRIBUTED" "$@"\n'
    )
    (folder / "ablate").chmod(0o755)
    sent = f"cd {shlex.quote(str(tmp_path))} && {flags['--command']}"
    heard = call(["bash", "-c", sent], {"PATH": "/usr/bin:/bin", "HOME": "/"})
    assert heard.stdout.splitlines() == ["1", "run", *words]


def test_delete(script):
    done, calls = script("delete", ZONE="us-east5-a")
    assert done.returncode == 0
    assert [parsed(words)[:2] for words in calls] == [("delete", ["ablate"])]


@pytest.mark.parametrize(
    "words, variables, message",
    [
        (["run"], {}, "ZONE: the zone of the slice"),
        (["create"], {"ZONE": "us-east5-a"}, "STORE: server:/share"),
        (["crate"], {"ZONE": "us-east5-a"}, "usage: "),
        ([], {"ZONE": "us-east5-a"}, "usage: "),
    ],
)
def test_what_is_missing_is_named(script, words, variables, message):
    done, calls = script(*words, **variables)
    assert done.returncode != 0 and message in done.stderr
    assert calls == []
