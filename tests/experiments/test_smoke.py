"""Every experiment file runs at smoke scale and judges its claims; what was cut off resumes."""

import pytest

from layers.config import from_mapping
from layers.decoder import DecoderConfig
from research.ablation import discover, load
from research.ablation.experiment import SCALES
from research.cli import main

EXPERIMENTS = discover()

# A process each, for one may choose its number of devices.
SCRIPT = """
import contextlib
import sys
from pathlib import Path
from research.ablation import judge, load
from research.ablation.runner import execute, plan, results
from research.planning.topology import has_compiler

name, folder, is_cut = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "cut"
experiment = load(name)


class Quiet:
    \"""A progress display that shows nothing and can stop the run at a step.\"""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def over(self, total):
        return contextlib.nullcontext()

    def skip(self, arm, seed): ...

    def start(self, arm, seed, resumed): ...

    def finish(self, arm, seed, seconds, message):
        assert not message, f"{arm}, seed {seed}: {message}"

    def step(self, step, total, metrics):
        if self.stop_at is not None and step >= self.stop_at:
            raise KeyboardInterrupt


whole = plan(experiment, "smoke", folder / "whole", seeds=[0])
assert execute(whole, Quiet()) == {}
for claim in experiment.claims:
    if claim.name.startswith("tpu_") and not has_compiler():
        continue  # of a program compiled for TPUs
    verdict = judge(claim, results(whole))
    assert verdict.status != "not run", f"{claim.name}: {verdict.reason}"

# interrupted and resumed, the first arm gives the same metrics; if it trains nothing, it is short
arm = experiment.arms[0].name
if not is_cut or not (whole.units[0].workdir / "metrics.jsonl").exists():
    print("passed")
    sys.exit()
cut = plan(experiment, "smoke", folder / "cut", arms=[arm], seeds=[0])
try:
    execute(cut, Quiet(stop_at=3))
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("was not interrupted")
assert results(cut).arms == ()
execute(cut, Quiet())
before, after = (p.units[0].workdir / "metrics.jsonl" for p in (whole, cut))
assert before.read_text() == after.read_text()
loss = "loss" if "loss" in results(whole).scalars(arm) else "loss_1x"
assert results(whole).metric(arm, loss) == results(cut).metric(arm, loss)
print("passed")
"""


def run(run_script, *arguments):
    assert run_script(SCRIPT, *arguments, devices=1).endswith("passed\n")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_scale_runs_to_verdicts(name, run_script, tmp_path):
    run(run_script, name, tmp_path / "runs", "cut" if name == "architecture/gqa" else "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_scale_resumes(name, run_script, tmp_path):
    run(run_script, name, tmp_path / "runs", "cut")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_valid_model_at_every_scale(name, scale):
    experiment = load(name)
    config = experiment.config(scale)
    for arm in experiment.arms:
        from_mapping(DecoderConfig, experiment.arm_config(config, arm).model, "model")


def test_a_wrong_field_is_one_line_and_runs_nothing(tmp_path, capsys):
    argv = ["run", "architecture/gqa", "--scale=smoke", f"--workdir={tmp_path / 'w'}"]
    assert main([*argv, "--config.model.num_layer=3"]) == 2
    assert "did you mean 'num_layers'" in capsys.readouterr().err
    assert main([*argv, "--config.model.num_layers=many"]) == 2
    assert "model.num_layers='many': must be int" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.width=-4", "model.width=-4: must be > 0"),
        ("training.steps=0", "training.steps=0: must be > 0"),
        ("data.batch_size=0", "data.batch_size=0: must be at least 1"),
        ("mesh.tensor=3", "mesh=data=-1 × tensor=3: 3 must divide the number of devices, 1"),
        ("data.sequence_length=1", "data.sequence_length=1: must be at least 2"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_and_can_be_mended(override, message, tmp_path, capsys):
    argv = ["run", "architecture/gqa", "--scale=smoke", "--arms=mha", "--seeds=0"]
    argv += [f"--workdir={tmp_path}", f"--config.{override}"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    # the vocabulary is that of the data, so the data is read before any arm
    arm = "" if override.startswith("data.") else "arm 'mha': "
    assert said == f"ablate: {arm}{message}\n"
    assert not list(tmp_path.rglob("unit.json"))


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = ["run", "architecture/gqa", "--scale=smoke", f"--workdir={tmp_path / 'file' / 'runs'}"]
    assert main(argv) == 2
    assert "Not a directory" in capsys.readouterr().err
