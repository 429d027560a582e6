"""The JobSet is one by Kubernetes' rules, and its pods find each other."""

import configparser
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from research.cli import main
from tests.conftest import ROOT
from tests.research.launch.conftest import JOINS, LAUNCH, call

MANIFEST = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
(TRAIN,) = MANIFEST["spec"]["replicatedJobs"]
JOB = TRAIN["template"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
INDEX = "batch.kubernetes.io/job-completion-index"


def schema():
    path = Path(__file__).with_name("jobset-v1alpha2.json.gz")
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress(path.read_bytes())))


def test_it_fits_the_schema_of_jobset():
    assert [str(error) for error in schema().iter_errors(MANIFEST)] == []


@pytest.mark.parametrize(
    "path, value",
    [
        (["spec", "failurePolicy"], {"maxRestart": 20}),
        (["spec", "replicatedJobs", 0, "template", "spec", "parallelism"], "2"),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers"], None),
    ],
)
def test_the_schema_refuses_what_is_no_jobset(path, value):
    broken = place = json.loads(json.dumps(MANIFEST))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert list(schema().iter_errors(broken))


def test_names_are_those_kubernetes_takes():
    """DNS-1123 labels, environment names, and pods' host names of at most 63 characters."""
    named = [*POD["volumes"], CONTAINER, TRAIN, MANIFEST["metadata"]]
    for name in (item["name"] for item in named):
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name), name
    for variable in CONTAINER["env"]:
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable["name"])
    assert {m["name"] for m in CONTAINER["volumeMounts"]} == {v["name"] for v in POD["volumes"]}
    assert len(hostname(JOB["completions"] - 1)) <= 63
    image = r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+:[\w.-]+"
    assert re.fullmatch(image, CONTAINER["image"])


def hostname(pod: int) -> str:
    """Of ``pod`` of the first job, as JobSet's documentation forms it."""
    return f"{MANIFEST['metadata']['name']}-{TRAIN['name']}-0-{pod}"


def test_the_run_starts_again_as_a_whole():
    """A process that is gone takes the others with it, so that no pod may come back alone."""
    assert (JOB["backoffLimit"], POD["restartPolicy"]) == (0, "Never")
    assert MANIFEST["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert JOB["completionMode"] == "Indexed" and TRAIN["replicas"] == 1
    # a Job that completes fewer pods than it runs has none with some index
    assert JOB["completions"] == JOB["parallelism"]


def environment_of(pod: int) -> dict[str, str]:
    """What a kubelet puts into the environment of ``pod``."""
    found = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(pod)}
    for variable in CONTAINER["env"]:
        if "value" in variable:
            assert "$(" not in variable["value"]
            found[variable["name"]] = variable["value"]
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == f"metadata.annotations['{INDEX}']"
            found[variable["name"]] = str(pod)
    return found


def entrypoint() -> list[str]:
    line = dockerfile()[-1]
    assert line[0] == "ENTRYPOINT"
    return json.loads(line[1])


def test_pods_find_each_other(stubs):
    variables = stubs(2, ablate=JOINS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for pod in range(JOB["completions"]):
        told = environment_of(pod)
        host, _, its_port = told["JAX_COORDINATOR_ADDRESS"].partition(":")
        # the pod's name in the headless service, which is called as the JobSet
        assert host == f"{hostname(0)}.{MANIFEST['metadata']['name']}"
        assert CONTAINER["ports"] == [{"containerPort": int(its_port)}]
        told["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"  # no such name is known here
        processes.append(
            subprocess.Popen(
                entrypoint() + CONTAINER["args"],
                env=variables | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for pod, (out, error) in enumerate(outputs):
        words = " ".join(CONTAINER["args"])
        assert f"{pod} 2 4 1 all {words}" in out.splitlines(), error[-4000:]
        assert "Kubernetes" not in error, "JAX looked for what it was told"


def test_what_it_runs_is_a_command_of_ablate(capsys):
    assert entrypoint() == ["ablate"]
    assert main([*CONTAINER["args"], "--list-units"]) == 0
    (mount,) = (m for m in CONTAINER["volumeMounts"] if m["name"] == "runs")
    assert f"--workdir={mount['mountPath']}/" in " ".join(CONTAINER["args"])


def dockerfile() -> list[tuple[str, str]]:
    """Instruction and rest of each line of the Dockerfile."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    parts = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    found = [(name, rest) for name, _, rest in parts]
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    assert {name for name, _ in found} <= known
    return found


def test_the_image_holds_all_that_the_package_is_built_from(tmp_path):
    """What its COPY lines leave is built as pip does, with the build tools of this machine."""
    source = tmp_path / "source"
    source.mkdir()
    for rest in (rest for name, rest in dockerfile() if name == "COPY"):
        *paths, to = rest.split()
        for path in paths:
            if to == "./":
                shutil.copy(ROOT / path, source)
            else:
                shutil.copytree(ROOT / path, source / to)
    (install,) = (rest for name, rest in dockerfile() if name == "RUN")
    assert install == 'pip install --no-cache-dir ".[$EXTRA]"'
    extras = configparser.ConfigParser()
    extras.read(source / "setup.cfg")
    (default,) = (rest for name, rest in dockerfile() if name == "ARG")
    assert {"tpu", default.removeprefix("EXTRA=")} <= set(extras["options.extras_require"])
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    done = call([*pip, "--wheel-dir", tmp_path, source], dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("ablate-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    launch = {f"research/launch/{path.name}" for path in LAUNCH.iterdir()}
    assert launch | {"research/cli/__main__.py", "experiments/architecture/gqa.py"} <= held
