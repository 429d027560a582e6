"""Our training step compared with PyTorch's, and our training loop compared with the step alone.

``width256`` and ``width512``: one step (forward, backward, AdamW) of a Llama-like decoder of 4 and
of 8 layers, 8 rows of 256 tokens, 1024 tokens of vocabulary, float32, all cores. Ours is the step
of `research.training` on an unrolled stack. Theirs is `research.benchmark.torch_decoder`, eager and
with `torch.compile`, with PyTorch's attention and fused AdamW. All begin from our weights. The
first loss and its change after the first update must agree.

Each contestant is also measured in a separate process with empty caches
(`research.benchmark.alone`): ``compile_seconds``, the time of its first step, and ``peak_bytes``,
the largest memory that it uses in the following steps.

``loop``: a step of `research.training.train`, with data from its pipeline, compared with the same
compiled step in a plain ``for`` loop over the same batches, which are on the device already.
``ours/xla`` writes its metrics to a workdir, ``ours/no workdir`` only prints. Saving and evaluation
are not part of a step.

Results of profiles on a CPU, per operation (`jax.profiler`, on the two cores that the records
name):

- At 256 tokens attention was one block of 256 × 256 scores. Half of them are masked, but causality
  saved nothing: 25 ms for four heads, forward and backward, against 15 ms in blocks of 64.
  Splitting short causal calls into quarters (`pallas_kernels.flash_attention.xla`) reduced the step
  at width 256 from 250 to 205 ms.
- Matrix products are two thirds of the remaining time, at 240 GFLOP/s. The transposition of heads
  and time is 8%, the gradient of rotary's halves 4%, the argmax of the reported accuracy 2%.
- Splitting instead of slicing rotary's halves, and two maxima instead of the argmax, changed the
  step's time by less than its spread. They were not adopted.
- The temporaries of a step (0.3 and 1.1 GB) are mapped anew each time. Our steps took longer
  between PyTorch's steps than back to back, at width 512 by half. A likely cause is that memory
  that was returned to the system is slow to map again; this was not shown. So each step is timed
  after a step of the same contestant, as in training. Keeping the memory
  (``glibc.malloc.arena_max=1``, no trimming) doubled it at width 512 and gained nothing.
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
    """``names`` of `CASES`, checked by `step.choose`."""
    return step.choose(names, CASES)


def bench(
    names: Sequence[str], *, rounds: int, seconds: float, budget: measure.Budget
) -> dict[str, Any]:
    """Each of ``names`` of `CASES`, as one JSON-ready record."""
    machine = machine_record(["torch"])  # includes the load before the measurements
    ceilings = {"float32": measure.ceilings("float32", rounds, seconds)}
    measured = {}
    for name in names:
        deadline = budget.share()
        of_case = _loop if name == LOOP else _steps
        measured[name] = of_case(name, rounds, seconds, deadline, budget.clock)
    result = {"op": NAME, "passes": [STEP], "machine": machine}
    result |= {"ceilings": ceilings, "cases": measured}
    return result | {"targets": judge(result)}


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
    has_torch = importlib.util.find_spec("torch") is not None
    contestants = [OURS, *([EAGER, COMPILED] if has_torch else [])]
    separate = {who: alone.measure(name, who) for who in contestants if clock() < deadline}
    prepared = {who: subject.prepare(who, size, model) for who in contestants}
    result = step.rows(prepared, flops, rounds, seconds, deadline, clock)
    for who, row in result.items():
        if "absent" not in row:
            row["tokens_per_second"] = subject.BATCH * subject.TIME / row["median"]
            # None if the budget ended before: times of compilation beside others do not count
            row |= separate.get(who, {"compile_seconds": None, "peak_bytes": None})
    if not has_torch:
        result |= {who: {"absent": "skipped: torch not installed"} for who in (EAGER, COMPILED)}
    return {"case": case, STEP: result}


def _loop(name: str, rounds, seconds, deadline, clock) -> dict[str, Any]:
    size = CASES[name]
    data = DataConfig(sequence_length=subject.TIME, batch_size=subject.BATCH)
    training = TrainingConfig(
        steps=BLOCK + 2, optimizer=OPTIMIZER, eval_batches=0, checkpoint_every=BLOCK + 2
    )
    model = subject.begin(size)
    case, flops = _case(size, model), _flops(model)
    # the batches on which `train` is timed: without the first one, whose step compiles
    dataset = iter(make_dataset(data, seed=0))
    batches = [shard_batch(next(dataset), make_mesh()) for _ in range(BLOCK + 1)][1:]
    state = [TrainState.begin(model, make_optimizer(OPTIMIZER, training.steps), 0)]
    step_fn = make_step(training)

    def bare() -> float:
        started = clock()
        for batch in batches:
            state[0], metrics = step_fn(state[0], batch)
        jax.block_until_ready((state[0], metrics))
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
    result: dict[str, dict[str, Any]] = {}
    for who, measured in times.items():
        if not measured:
            result[who] = {"absent": measure.BUDGET}
            continue
        result[who] = measure.describe(measured) | {"compile_seconds": None, "temp_bytes": None}
        result[who]["flops_per_second"] = flops / result[who]["median"]
    compare(result)
    return {"case": case, STEP: result}


def _seconds_of_a_step(size, data, training, workdir: Path | None) -> float:
    """Seconds per step of `train`, over `BLOCK` steps.

    When it reports step n, it has dispatched step n and read the metrics of step n − 1. So from the
    report of step 2 to that of step 2 + `BLOCK`, `BLOCK` steps are dispatched, fed, read and
    reported.
    """
    reported: dict[int, float] = {}
    with contextlib.redirect_stdout(io.StringIO()), bar(training.steps) as show:

        def progress(done, steps, metrics):
            show(done, steps, metrics)
            reported[done] = time.perf_counter()

        train(subject.decoder(size), data, training, workdir=workdir, progress=progress)
    return (reported[2 + BLOCK] - reported[2]) / BLOCK
