"""Pages for readers: links resolve, paths are there, commands are those of `ablate`, code runs."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from flax import nnx

from layers.decoder import Decoder
from research import cli
from research.ablation import discover
from research.ablation.techniques import BEGIN, END
from research.benchmark import engine, models, ops, train
from research.convert import import_directory
from research.data import train_bpe
from research.models import decoder_config, save
from research.planning.topology import has_compiler

ROOT = Path(__file__).parents[1]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WRITTEN, *sorted((ROOT / "experiments/results").rglob("*.md"))]
PAGES += sorted((ROOT / "pallas_kernels/results").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOP = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def blocks(path: Path, language: str) -> list[str]:
    found = FENCE.findall(path.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of ``path``."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("experiment", discover())
def test_commands_of_an_experiment_leave_times_to_its_records(experiment):
    """`ablate list` and the README's table print the time of the recorded run."""
    text = ast.get_docstring(ast.parse((ROOT / f"experiments/{experiment}.py").read_text("utf-8")))
    commands = [line for line in (text or "").splitlines() if f"ablate run {experiment}" in line]
    assert len(commands) == 4
    for line in commands:
        duration = r"\d+ ?(s|min|h)\b|\b(second|minute|hour)s?\b"
        assert not re.search(duration, line.partition("#")[2]), line


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_paths_that_are_named_are_there(page):
    for path in re.findall(rf"`((?:{TOP})/[\w./-]*)`", prose(page)):
        placeholder = re.search(r"[A-Z]{2}", path)
        assert placeholder or path.startswith("runs/") or (ROOT / path).exists(), path


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind each ``ablate`` of a page's shell blocks."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r" [|&]+ | && ", line.split("#")[0]):
                words = shlex.split(part)
                found = [i for i, word in enumerate(words) if Path(word).name == "ablate"]
                module = words[:3] == ["python", "-m", "research.cli"]
                if found or module:
                    yield words[found[0] + 1 if found else 3 :]


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_commands_are_those_of_the_command(page):
    for words in commands(page):
        options, overrides = cli._split(words)
        asked = cli._parser().parse_args(options)
        if words[0] in ("run", "plan"):
            assert asked.name in discover(), words
        else:
            assert not overrides, words
        if words[0] == "bench" and asked.op is not None:
            assert asked.op in {*ops.known(), engine.NAME, models.NAME, train.NAME}, words


def test_some_commands_are_found():
    verbs = {words[0] for page in WRITTEN for words in commands(page)}
    assert verbs == {
        "list", "run", "generate", "serve", "report", "plan", "bench", "import", "export",
        "compile",
    }  # fmt: skip


def test_the_readme_is_short():
    before, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    assert len((before + rest.partition(END)[2]).splitlines()) <= 150


def test_the_table_of_kernels_is_what_there_is():
    table = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\]\([^|]*\|(.*)\|$", table, re.MULTILINE))
    folders = {path.parent for path in (ROOT / "pallas_kernels").glob("*/reference.py")}
    assert set(rows) == {folder.name for folder in folders}
    for folder in folders:
        there = [(folder / f"{kind}.py").exists() for kind in ("xla", "tpu", "gpu")]
        assert there == [cell.strip() == "yes" for cell in rows[folder.name].split("|")], folder


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder like the checkout, with a small model imported where the pages have one."""
    for page in WRITTEN:
        (tmp_path / name(page)).parent.mkdir(exist_ok=True)
        (tmp_path / name(page)).write_bytes(page.read_bytes())
    monkeypatch.chdir(tmp_path)


def import_small_model() -> None:
    theirs = Path("models/Qwen3-0.6B")
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, intermediate_size=24)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = decoder_config({"model_type": "qwen3", **sizes, **heads})
    save(Decoder(config, rngs=nnx.Rngs(0)), theirs, "qwen3")
    train_bpe([Path("README.md").read_text()], 300, theirs / "tokenizer.json")
    import_directory(theirs, Path("runs/qwen3"))


SLOW = ("README.md", "models.md", "training.md")  # these train


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=name(page))
        for page in WRITTEN
        if blocks(page, "python")
    ],
)
def test_code_runs(page, reader):
    if "topology" in "".join(blocks(page, "python")) and not has_compiler():
        pytest.skip("requires the TPU compiler")
    if page.name == "models.md":
        import_small_model()
    names = {"__name__": "page"}  # a page is read, and runs, from top to bottom
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), names)
    for words in commands(page):
        if "runs/tuned" in words:  # what the page has trained
            assert cli.main(words) == 0
