"""`ablate plan`: what it prints, keeps and refuses; libtpu's talk is not to be heard."""

import dataclasses
import json

import pytest

from layers.config import from_mapping
from layers.decoder import DecoderConfig
from layers.state import CacheConfig
from research.ablation import discover, load, plans
from research.ablation.experiment import SCALES
from research.ablation.report import results_folder
from research.cli import main
from research.files import plain, read_json
from research.parallel import MeshConfig
from research.planning.plan import Plan
from research.planning.step import Setup, check_setup
from research.training import TrainingConfig
from tests.research.conftest import SOURCE

GQA = ["plan", "architecture/gqa", "--scale=smoke"]


@pytest.mark.tpu_compile
def test_a_plan_is_printed_and_nothing_else(capfd):
    assert main([*GQA, "--topology=v5e:2x2", "--mesh=fsdp:4", "--config.data.batch_size=8"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    for line in (
        "mha on v5e:2x2 (4 × TPU v5 lite), mesh fsdp:4",
        "28,896 parameters, training on 8 × 32 tokens a step, remat none",
        "fits 15.75 GiB with 15.7",
        "reduce-scatter",
        "tokens/s at most",
    ):
        assert line in printed.out


@pytest.fixture
def instant(monkeypatch):
    """A compiler that takes no time: plans whose bytes and floor depend on the mesh alone."""

    def plan(setup):
        split = setup.mesh.fsdp if setup.mesh.fsdp > 0 else 4
        total = {1: 90, 2: 60, 3: 120 // split + 10}[setup.mesh.zero_stage]
        held = dict(parameters=30, moments=60, batch=1, temporaries=total - 91)
        return Plan(
            setup, "stand-in", 4, dict(fsdp=split), 10, {**held, "total": total, "memory": 65},
            dict(model=1.0, executed=1.0), {"all-gather": dict(count=3, moved=1024.0)},
            dict(compute=0.1, links=0.1 * setup.mesh.zero_stage), 1.0, 0.0,
        )  # fmt: skip

    monkeypatch.setattr(plans, "plan", plan)


def test_meshes_side_by_side_and_the_best(instant, capsys):
    argv = [*GQA, "--topology=v5e:2x2", "--config.data.batch_size=8"]
    meshes = ["--mesh=fsdp:4,zero:1", "--mesh=fsdp:4,zero:2", "--mesh=fsdp:4"]
    assert main([*argv, *meshes]) == 1  # one of them does not fit
    assert "best: fsdp:4,zero:2: 200 ms a step at least, 5 B to spare" in capsys.readouterr().out
    assert main([*argv, "--sweep"]) == 0
    printed = capsys.readouterr().out
    assert "1/4 fsdp:4,zero:1: does not fit 65 B: 25 B too many" in printed
    assert "best: fsdp:4,zero:2" in printed
    assert main([*argv, meshes[0]]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_each_arm_has_a_best_mesh(instant, capsys):
    argv = [*GQA, "--topology=v5e:2x2", "--config.data.batch_size=8", "--arms=mha,mqa"]
    assert main([*argv, "--sweep"]) == 0
    best = "best: fsdp:4,zero:2: 200 ms a step at least, 5 B to spare"
    printed = capsys.readouterr().out
    assert f"mha: {best}\n" in printed and f"mqa: {best}\n" in printed
    assert main([*argv, "--topology=v5e:1x1", "--sweep"]) == 2
    assert "no mesh of this slice, of two devices or more, divides" in capsys.readouterr().err


def test_a_mesh_that_no_batch_fits_hides_no_other(instant, monkeypatch, capsys):
    monkeypatch.setattr(plans.sweeps, "plan", plans.plan)
    argv = [*GQA, "--topology=v5e:2x2", "--fit"]
    assert main([*argv, "--mesh=fsdp:4,zero:1", "--mesh=fsdp:4"]) == 0
    printed = capsys.readouterr().out
    assert "mha, fsdp:4,zero:1: batch_size=4: the smallest of this mesh exceeds its mem" in printed
    assert "mesh fsdp:4" in printed and "fits 65 B" in printed
    assert main([*argv, "--mesh=fsdp:4,zero:1"]) == 2
    assert "batch_size=4: the smallest" in capsys.readouterr().err


def test_a_record_holds_every_arm_once(instant, tmp_path, capsys):
    assert main(["plan", "architecture/gqa", "--record", f"--results={tmp_path}"]) in (0, 1)
    held = json.loads((tmp_path / "plans/architecture/gqa.json").read_text())
    arms = [one["arms"] for one in held["plans"]]
    # the uptrained arms' programs are those of their models
    assert arms == [
        ["mha", "uptrained_multi_head"],
        ["gqa", "uptrained_mean", "uptrained_first", "uptrained_random"],
        ["mqa"],
    ]
    assert held["plans"][0]["setup"]["topology"] == "v5p:4x4x4" and "commit" in held["environment"]
    page = (tmp_path / "plans/architecture/gqa.md").read_text()
    assert page.count("```") == 6 and "all-gather" in page
    # the board is of runs alone
    assert main(["report", f"--results={tmp_path}"]) == 0
    assert "no records yet" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5e:2x2", "--mesh=fsdp"], "--mesh=fsdp: must be comma-separated axis:size"),
        (
            ["--topology=v5e:2x2", "--mesh=fdsp:4"],
            "mesh.fdsp=4: no such field; did you",
        ),
        (["--topology=v5e:2x2", "--mesh=fsdp:4,zero:5"], "mesh.zero=5: must be 1, 2 or 3"),
        (["--topology=v5e:2x2", "--decode=8"], "--decode=8: must be ROWSxLENGTH"),
        (["--topology=v5e:2x2", "--batch=0"], "batch=0: must be > 0"),
        (["--topology=v5e:2x2", "--arms=mhaa"], "did you mean 'mha'?"),
        (["--topology=nowhere"], "topology='nowhere': "),
        ([], "topology=None: must name a slice at scale smoke"),
        (["--record"], "--record: plans paper scale as declared"),
        (["--scale=paper", "--record", "--batch=3"], "--record: plans paper scale as declared"),
        (["--scale=paper", "--record", "--arms=mha"], "--record: plans paper scale as declared"),
        (
            ["--topology=v5e:2x2", "--decode=8x8", "--mesh=fsdp:4,zero:1"],
            "mesh.zero=1: changes nothing: decoding has no gradients",
        ),
        (
            ["--topology=v5e:2x2", "--config.model.vocab_size=9"],
            "model.vocab_size=9: must be at least the vocabulary of the data, 258",
        ),
        (["--fit", "--sweep"], "not allowed with argument"),
        (["--topology=v5e:2x2", "--config.model.widht=3"], "did you mean 'width'?"),
    ],
)
def test_requests_that_cannot_be_planned(capfd, arguments, message):
    assert main([*GQA, *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("scale", SCALES)
def test_every_arm_of_every_scale_is_a_step(scale):
    """Nobody runs paper scale in a test: that what it asks for can be is seen here."""
    for name in discover():
        experiment = load(name)
        arms = [arm.name for arm in experiment.arms]
        found = plans.setups(experiment, scale, "v5p:2x2x1", arms=arms)
        assert sorted(arm for each in found for arm in each) == sorted(arms)


def decoding(name, arms, **options) -> dict[str, Setup]:
    """Arm → its one setup, for an experiment at cpu scale."""
    found = plans.setups(load(name), "cpu", "v5e:2x2", arms=arms, **options)
    setups = {}
    for names, (setup,) in found.items():
        assert isinstance(setup, Setup) and setup.training is None
        setups |= dict.fromkeys(names, setup)
    return setups


def test_an_engine_is_planned_by_its_decoding_step():
    name, config = "efficiency/paged_attention", load("efficiency/paged_attention").config("cpu")
    whole, paged = decoding(name, ["contiguous", "paged_16"]).values()
    assert (whole.batch_size, paged.batch_size) == (config["engine"].slots, config["rows"])
    assert whole.sequence_length == paged.sequence_length == config["engine"].max_length
    assert whole.cache == CacheConfig()
    # as many slots of the cache
    assert paged.cache == CacheConfig("paged", page=16, pages=config["tokens"] // 16)
    overrides = ["engine.cache.dtype=int8"]
    other = decoding(name, ["paged_16"], decode=(6, 128), overrides=overrides)["paged_16"]
    assert (other.batch_size, other.sequence_length, other.cache.dtype) == (6, 128, "int8")


def test_a_decoding_step_has_the_cache_of_its_arm():
    found = decoding("efficiency/kv_cache", ["base", "int8", "int4"], decode=(8, 64))
    dtypes = {name: setup.cache.dtype for name, setup in found.items()}
    assert dtypes == {"base": "float32", "int8": "int8", "int4": "int4"}


def test_an_experiment_without_a_model_is_refused(make_package):
    experiment = load("branch/wide", make_package())
    missing = "has neither plan_step.config, mesh. nor, in its configuration, data, training, mesh$"
    with pytest.raises(ValueError, match=f"^experiment='branch/wide': {missing}"):
        plans.setups(experiment, "paper", "v5e:2x2", arms=["narrow"])
    with pytest.raises(ValueError, match="^topology=None: branch/wide declares no TOPOLOGY"):
        plans.topology(experiment, "paper")


PRODUCT = (
    SOURCE
    + """
import jax
from jax.sharding import NamedSharding, PartitionSpec
from research.planning.step import Step

TOPOLOGY = "v5e:2x2"

def plan_step(config, mesh):
    def on(axis, *shape):
        where = NamedSharding(mesh, PartitionSpec(axis))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=where)

    width = 128 * config.model.width
    x, weight = on("data", 1024, width), on(None, width, width)
    return Step(lambda x, w: x @ w, {"rows": x, "weight": weight}, flops=2 * 1024 * width**2)
"""
)


@pytest.mark.tpu_compile
def test_a_custom_step_is_planned(make_package, tmp_path, capfd):
    package = make_package(product=PRODUCT)
    argv = ["plan", "branch/product"]
    assert main(argv, package=package) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    for line in (
        "narrow on v5e:2x2 (4 × TPU v5 lite), mesh data:4",
        "the experiment's plan_step",
        "  rows               512 KiB",  # a quarter of 1024 rows of 512 numbers
        "  weight               1 MiB",
        "collectives a step\n  none",
        f"FLOPs a step: {2 * 1024 * 512**2:.4g} of the model",
        "steps/s at most",
    ):
        assert line in printed.out
    meshes = ["--mesh=data:4", "--mesh=data:2,tensor:2"]
    assert main([*argv, "--arms=all", *meshes], package=package) == 0
    printed = capfd.readouterr().out
    assert "steps/s" in printed and "wide: best: data:4: " in printed
    assert main([*argv, "--record", f"--results={tmp_path}"], package=package) == 0
    held = json.loads((tmp_path / "plans/branch/product.json").read_text())["plans"]
    assert [one["arms"] for one in held] == [["narrow"], ["wide"], ["tuned"]]
    assert held[1]["setup"]["config"]["model"]["width"] == 8 and "make" not in held[1]["setup"]
    assert held[1]["bytes"]["weight"] == 4 * 1024**2 and held[1]["parameters"] is None


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "source, arguments, message",
    [
        ("", ["--batch=8"], "batch=8: requires a language model: branch/product has a plan_step"),
        ("", ["--decode=8x8"], "decode=(8, 8): requires a language model"),
        ("", ["--fit"], "--fit: requires a language model: narrow has a plan_step"),
        ("", ["--sweep"], "--sweep: requires a language model: narrow"),
        ("", ["--mesh=fsdp:4,data:1,zero:1"], "mesh.zero=1: changes nothing: plan_step receives"),
        ("", ["--arms=wyde"], "did you mean 'wide'?"),
        ("plan_step = 3", [], "product.py: plan_step must be a function"),
        ("def plan_step(config, mesh): return 3", [], "plan_step=3: must return a Step"),
        (
            "def plan_step(config, mesh):\n    return Step(abs, {'total': ()}, 1.0)",
            [],
            "plan_step: name='total': must not be temporaries, total or memory",
        ),
        (
            "def plan_step(config, mesh):\n    return Step(abs, {'x': jax.numpy.ones(3)}, 1.0)",
            [],
            "plan_step: x=Array([1., 1., 1.], dtype=float32): must have a sharding on the mesh",
        ),
    ],
)
def test_a_custom_step_that_cannot_be_planned(make_package, capfd, source, arguments, message):
    package = make_package(product=f"{PRODUCT}\n{source}\n")
    assert main(["plan", "branch/product", *arguments], package=package) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def _setup(held: dict) -> Setup:
    """Of a record, which lacks fields that were added after it was made."""
    model = from_mapping(DecoderConfig, held["model"])
    training = held["training"] and from_mapping(TrainingConfig, held["training"])
    # of float32 parameters there is no copy, so ``master`` decides nothing
    if training and model.param_dtype == "float32":
        optimizer = dataclasses.replace(training.optimizer, master=True)
        training = dataclasses.replace(training, optimizer=optimizer)
    mesh = from_mapping(MeshConfig, held["mesh"])
    cache = from_mapping(CacheConfig, held.get("cache", {}))
    return Setup(**{**held, "model": model, "training": training, "mesh": mesh, "cache": cache})


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", discover())
def test_paper_scale_divides_over_its_slice(name):
    """No arm is refused by the checks that precede compilation."""
    experiment = load(name)
    arms, slice_ = plans.paper_arms(experiment), plans.topology(experiment, "paper")
    for setups in plans.setups(experiment, "paper", slice_, arms=arms).values():
        for setup in setups:
            if isinstance(setup, Setup):
                check_setup(setup)


RECORDS = results_folder() / "plans"
RECORDED = sorted(RECORDS.rglob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_plan_is_of_the_experiment_as_it_is_and_fits(path):
    """Its models, batches and strategies are those that paper scale would run now."""
    held = read_json(path)
    experiment = load(held["experiment"])
    assert path == (RECORDS / experiment.name).with_suffix(".json")
    arms = plans.paper_arms(experiment)
    slice_ = plans.topology(experiment, "paper")
    wanted = plans.setups(experiment, "paper", slice_, arms=arms)
    setups = {tuple(one["arms"]): _setup(one["setup"]) for one in held["plans"]}
    assert setups == {names: _setup(plain(dataclasses.asdict(s))) for names, (s,) in wanted.items()}
    assert all(one["fits"] for one in held["plans"])
