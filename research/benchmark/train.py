"""Our training step beside the same decoder in plain PyTorch, and our loop beside the step alone.

``width256`` and ``width512``: one step (forward, backward, AdamW) of a Llama-like decoder of 4 and
of 8 layers, 8 rows of 256 tokens, 1024 tokens of vocabulary, float32, all cores. Ours is
`research.training`'s own step on an unrolled stack. Theirs is `research.benchmark.torch_decoder`,
eager and by `torch.compile`, with PyTorch's attention and fused AdamW. All begin from our weights;
the first loss and what the first update does to it must agree.

Of each contestant, in a process of its own with empty caches (`research.benchmark.alone`):
``compile_seconds``, how long its first step takes, and ``peak_bytes``, how much of the machine's
memory it holds at most in the steps after that.

``loop``: a step of `research.training.train`, data from its pipeline, beside the same compiled step
in a bare ``for`` over the same batches, already on the device. ``ours/xla`` writes its metrics into
a workdir, ``ours/no workdir`` only prints. Saving and evaluating are no part of a step.

What profiles of a CPU showed, op by op (`jax.profiler`, of the two cores the records name):

- At 256 tokens attention was one block of 256 × 256 scores, half of which nobody may see, so that
  causality saved nothing: 25 ms for four heads, forward and backward, against 15 in blocks of 64.
  Cutting short causal calls into quarters (`pallas_kernels.flash_attention.xla`) took the step at
  width 256 from 250 to 205 ms.
- Products of matrices are two thirds of what remains, at 240 GFLOP/s; turning heads before time is
  8%, the gradient of rotary's halves 4%, the argmax of the reported accuracy 2%.
- Splitting instead of slicing rotary's halves, and two maxima instead of the argmax, changed the
  step's time by less than its spread: left as they were.
- A step's temporaries (0.3 and 1.1 GB) are mapped anew each time. Our steps took longer between
  PyTorch's than back to back, at width 512 by half; that pages given back are slow to get again is
  likely and was not shown. So each is timed after a step of its own, as in training. To keep them
  (``glibc.malloc.arena_max=1``, no trimming) took twice the memory at width 512 and gained nothing.
"""

import contextlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from layers.decoder import Decoder
from research.benchmark import alone, measure, step, subject
from research.benchmark.run import compare, machine_record
from research.benchmark.step import OPTIMIZER, OURS
from research.benchmark.subject import COMPILED, EAGER
from research.benchmark.targets import STEP, judge
from research.data import DataConfig, make_dataset
from research.parallel import make_mesh, shard_batch
from research.training import TrainingConfig, train
from research.training.flops import train_flops_per_token
from research.training.optimizers import make_optimizer
from research.training.progress import bar
from research.training.state import TrainState
from research.training.step import make_step

NAME = "train"
SILENT, BARE = "ours/no workdir", "bare step"
BLOCK = 16  # steps of a loop that are timed at once
LOOP = "loop"
CASES = {**subject.SIZES, LOOP: subject.Size(256, 4)}


def chosen(names: Sequence[str] | None) -> list[str]:
    """``names`` of `CASES`, as `step.choose` has it."""
    return step.choose(names, CASES)


def bench(
    names: Sequence[str], *, rounds: int, seconds: float, budget: measure.Budget
) -> dict[str, Any]:
    """Each of ``names`` of `CASES`, as one JSON-ready record."""
    machine = machine_record(["torch"])  # with the load before anything is timed
    ceilings = {"float32": measure.ceilings("float32", rounds, seconds)}
    measured = {}
    for name in names:
        deadline = budget.share()
        of_case = _loop if name == LOOP else _steps
        measured[name] = of_case(name, rounds, seconds, deadline, budget.clock)
    found = {"op": NAME, "passes": [STEP], "machine": machine}
    found |= {"ceilings": ceilings, "cases": measured}
    return found | {"targets": judge(found)}


def _case(size: subject.Size, model: Decoder) -> dict[str, Any]:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    return {
        "width": size.width, "layers": size.layers, "batch": subject.BATCH,
        "tokens": subject.TIME, "vocab": subject.VOCAB, "parameters": parameters,
        "dtype": "float32",
    }  # fmt: skip


def _flops(model: Decoder) -> float:
    return train_flops_per_token(model, subject.TIME) * subject.BATCH * subject.TIME


def _steps(name: str, rounds, seconds, deadline, clock) -> dict[str, Any]:
    size = subject.SIZES[name]
    model = subject.begin(size)
    case, flops = _case(size, model), _flops(model)
    there = importlib.util.find_spec("torch") is not None
    contestants = [OURS, *([EAGER, COMPILED] if there else [])]
    apart = {who: alone.measure(name, who) for who in contestants if clock() < deadline}
    prepared = {who: subject.prepare(who, size, model) for who in contestants}
    found = step.rows(prepared, flops, rounds, seconds, deadline, clock)
    for who, row in found.items():
        if "absent" not in row:
            row["tokens_per_second"] = subject.BATCH * subject.TIME / row["median"]
            # the budget was gone before: unknown, as is what compiling beside others took
            row |= apart.get(who, {"compile_seconds": None, "peak_bytes": None})
    if not there:
        found |= {who: {"absent": "skipped: torch not installed"} for who in (EAGER, COMPILED)}
    return {"case": case, STEP: found}


def _loop(name: str, rounds, seconds, deadline, clock) -> dict[str, Any]:
    size = CASES[name]
    data = DataConfig(sequence_length=subject.TIME, batch_size=subject.BATCH)
    training = TrainingConfig(
        steps=BLOCK + 2, optimizer=OPTIMIZER, eval_batches=0, checkpoint_every=BLOCK + 2
    )
    model = subject.begin(size)
    case, flops = _case(size, model), _flops(model)
    # those that `train` is timed on: its first step compiles
    dataset = iter(make_dataset(data, seed=0))
    batches = [shard_batch(next(dataset), make_mesh()) for _ in range(BLOCK + 1)][1:]
    held = [TrainState.begin(model, make_optimizer(OPTIMIZER, training.steps), 0)]
    step_fn = make_step(training)

    def bare() -> float:
        started = clock()
        for batch in batches:
            held[0], metrics = step_fn(held[0], batch)
        jax.block_until_ready((held[0], metrics))
        return (clock() - started) / BLOCK

    def looped(workdir: Path | None) -> float:
        return _seconds_of_a_step(size, data, training, workdir)

    def written() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return looped(Path(folder))

    runs = {OURS: written, SILENT: lambda: looped(None), BARE: bare}
    times: dict[str, list[float]] = {who: [] for who in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(rounds):
        if clock() >= deadline or BLOCK * sum(times[BARE]) >= seconds:
            break
        for who, run in runs.items():
            times[who].append(run())
    found: dict[str, dict[str, Any]] = {}
    for who, taken in times.items():
        if not taken:
            found[who] = {"absent": measure.BUDGET}
            continue
        found[who] = measure.describe(taken) | {"compile_seconds": None, "temp_bytes": None}
        found[who]["flops_per_second"] = flops / found[who]["median"]
    compare(found)
    return {"case": case, STEP: found}


def _seconds_of_a_step(size, data, training, workdir: Path | None) -> float:
    """Of `train`, over `BLOCK` steps.

    When it tells of step n, it has dispatched n and read n − 1; so from step 2 to step 2 + `BLOCK`
    as many are computed, one is begun, and as many are fed, read and told.
    """
    told: dict[int, float] = {}
    with contextlib.redirect_stdout(io.StringIO()), bar(training.steps) as show:

        def progress(done, steps, metrics):
            show(done, steps, metrics)
            told[done] = time.perf_counter()

        train(subject.decoder(size), data, training, workdir=workdir, progress=progress)
    return (told[2 + BLOCK] - told[2]) / BLOCK
