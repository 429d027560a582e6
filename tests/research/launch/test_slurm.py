"""The Slurm scripts, run with an `srun` that starts its tasks on this machine."""

import random
import re
import socket

import pytest

from tests.research.launch.conftest import JOINS, LAUNCH, call
from tests.research.training.test_profile import traced

# What srun tells its tasks, as two nodes of one task each, and the worst of their statuses.
SRUN = """#!/usr/bin/env bash
for word in "$@"; do
    case "$word" in
    --kill-on-bad-exit=1 | --cpu-bind=none) shift ;;
    -*) echo "srun: $word" >&2 && exit 99 ;;
    *) break ;;
    esac
done
export SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=${NODES:-2} SLURM_STEP_NODELIST=localhost,localhost
tasks=() worst=0
for index in 0 1; do
    SLURM_PROCID=$index SLURM_LOCALID=0 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    wait "$task" || { status=$? && worst=$((status > worst ? status : worst)); }
done
exit "$worst"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*"\n'
ABLATE = """
import runpy
runpy.run_module("research.cli", run_name="__main__")
"""
# https://slurm.schedmd.com/sbatch.html
SBATCH = {
    "job-name", "output", "open-mode", "nodes", "ntasks", "ntasks-per-node", "gpus",
    "gpus-per-node", "time", "requeue", "signal",
}  # fmt: skip


def job_id() -> str:
    """A job's number from which JAX derives a port that is free: 61440 and its last 12 bits.

    Any, so that tests side by side do not take the same one.
    """
    for number in random.SystemRandom().sample(range(4096), 100):
        with socket.socket() as free:
            if free.connect_ex(("localhost", 61440 + number)):
                return str(4096 + number)
    raise AssertionError("no port is free")


@pytest.mark.parametrize("name", ["slurm.sh", "slurm_units.sh"])
def test_directives_are_of_sbatch_and_come_first(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    for n in directives:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=[\w:@%.-]+)?", lines[n])
        assert found and found[1] in SBATCH, lines[n]
    # sbatch stops reading them at the first command
    assert all(line.startswith("#") for line in lines[: directives[-1]])


@pytest.mark.parametrize("nodes, gpus", [(2, "all"), (1, "0")])
def test_processes_find_each_other(stubs, nodes, gpus):
    """Alone on its node, a process takes all GPUs; JAX's own choice is the one of its number."""
    variables = stubs(2, srun=SRUN, scontrol=SCONTROL, ablate=JOINS)
    variables |= {"SLURM_JOB_ID": job_id(), "NODES": str(nodes)}
    done = call(["bash", LAUNCH / "slurm.sh", "architecture/gqa", "--arms=a b"], variables)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if "architecture/gqa" in line]
    assert sorted(lines) == [f"{i} 2 4 1 {gpus} run architecture/gqa --arms=a b" for i in (0, 1)]
    assert "scontrol" not in done.stdout


@pytest.mark.parametrize("status, again", [(0, False), (1, False), (143, True)])
@pytest.mark.parametrize("name", ["slurm.sh", "slurm_units.sh"])
def test_a_job_that_was_stopped_is_queued_again(stubs, name, status, again):
    ablate = f"#!/usr/bin/env bash\n[ $SLURM_PROCID = 0 ] || exit {status}\n"
    variables = stubs(1, srun=SRUN, scontrol=SCONTROL, ablate=ablate)
    done = call(["bash", LAUNCH / name, "architecture/gqa"], {**variables, "SLURM_JOB_ID": "77"})
    assert done.returncode == status
    assert done.stdout == ("scontrol requeue 77\n" if again else "")


@pytest.mark.parametrize("index, ran", [(None, ""), (1, "--arms=a,b --seeds=0"), (2, "--arms=c")])
def test_a_task_of_an_array_takes_its_line(stubs, index, ran):
    units = "--arms=a,b --seeds=0\n--arms=c"
    ablate = f"""#!/usr/bin/env bash
case "$*" in *--list-units) echo "{units}" ;; *) [ $SLURM_PROCID = 1 ] || echo "$*" ;; esac
"""
    variables = stubs(1, srun=SRUN, ablate=ablate)
    variables |= {} if index is None else {"SLURM_ARRAY_TASK_ID": str(index)}
    done = call(["bash", LAUNCH / "slurm_units.sh", "architecture/gqa", "--scale=gpu"], variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"run architecture/gqa --scale=gpu {ran}".strip()


def test_a_task_beyond_the_last_line_runs_nothing(stubs):
    variables = stubs(1, srun=SRUN, ablate='#!/usr/bin/env bash\necho "--arms=a --seeds=0"\n')
    words = ["bash", LAUNCH / "slurm_units.sh", "architecture/gqa"]
    done = call(words, {**variables, "SLURM_ARRAY_TASK_ID": "2"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "there is no unit 2\n"


@pytest.mark.slow  # two processes, each of which compiles all
def test_an_experiment_to_its_verdicts(stubs, tmp_path):
    variables = stubs(2, srun=SRUN, scontrol=SCONTROL, ablate=ABLATE)
    variables["SLURM_JOB_ID"] = job_id()
    options = ["--scale=smoke", "--arms=rotary", "--seeds=0", "--config.mesh.tensor=2"]
    done = call(
        ["bash", LAUNCH / "slurm.sh", "architecture/rope", *options, "--profile=2:4",
         f"--workdir={tmp_path / 'run'}"],
        variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "not asked for: claims that require arms which --arms leaves out" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()
    folder = tmp_path / "run" / "rotary" / "seed0" / "profile"
    assert [traced(folder / f"process{i}")[0] for i in (0, 1)] == [[2, 3], [2, 3]]
