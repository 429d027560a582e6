"""``ablate bench``: times kernels, whole models, training and the engine beside their peers."""

import argparse
from pathlib import Path

from layers.config import ConfigError

_BENCH = """examples:
  ablate bench flash_attention --cases=t1024 --budget=60
  ablate bench flash_attention --shape=t=2048,h=4 --dtype=bfloat16 --peers=none
  ablate bench wkv7 --tune                    # this chip's row of pallas_kernels/wkv/blocks.json
  ablate bench --all --record --budget=1800   # pallas_kernels/results: JSON, page and plots
  ablate bench models --cases=llama,mamba2    # a training step beside transformers', on a CPU
  ablate bench train                          # the same decoder in PyTorch and in `train`
  ablate bench engine --cases=13m_b1          # generation beside transformers', on a CPU
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a kernel, models, training or the engine beside peers on this machine",
        epilog=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "op", metavar="OP", nargs="?", help="an operation, e.g. ssd; or models, train, engine"
    )
    parser.add_argument("--all", action="store_true", help="all operations, one after another")
    parser.add_argument("--cases", help="comma-separated names; default: all")
    parser.add_argument("--shape", help="other sizes for the first case, e.g. t=2048,h=4")
    parser.add_argument("--dtype", help="another dtype, e.g. bfloat16")
    parser.add_argument("--implementations", help="like --cases")
    parser.add_argument("--peers", help="like --cases, or none")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="for timing each, at most")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for the whole command")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="find block sizes for this chip")
    what.add_argument("--record", action="store_true", help="write the chip's file of results")
    what.add_argument("--out", type=Path, help="write this JSON file, its page and its plots")
    parser.set_defaults(command=_bench)


def _bench(options) -> int:
    from rich.console import Console

    from research.benchmark import engine, measure, models, ops, run, train, tune

    suites = {module.NAME: module for module in (models, train, engine)}
    if options.all == (options.op is not None):
        known = ", ".join((*ops.known(), *suites))
        raise ConfigError(f"op={options.op!r}: name one of {known}, or give --all alone")
    restrictions = [
        f"--{field}"
        for field in ("cases", "shape", "dtype", "implementations", "peers")
        if getattr(options, field) is not None
    ]
    if restrictions and (options.all or options.record):
        flag = "--all" if options.all else "--record"
        raise ConfigError(f"{flag}: runs everything; leave out {', '.join(restrictions)}")
    if options.op in suites:
        return _bench_whole(suites[options.op], options, restrictions)
    if options.tune and options.all:
        raise ConfigError("--all: name one op to --tune")
    run.check_effort(options.rounds, options.seconds, options.budget)
    # all requests are checked before anything runs
    requests = [
        run.request(
            name,
            cases=_tuning_case(name, options) if options.tune else _names(options.cases),
            shape=_sizes(options.shape),
            dtype=options.dtype,
            implementations=_names(options.implementations),
            peers=_names(options.peers),
        )
        for name in (ops.known() if options.all else [options.op])
    ]
    console = Console(highlight=False, markup=False)
    effort = {"rounds": options.rounds, "seconds": options.seconds}
    if options.tune:
        tuned = tune.tune(requests[0], **effort, budget=measure.Budget(options.budget, 1))
        console.print(tune.table(tuned))
        console.print(tune.save(tuned), soft_wrap=True)
        return 0
    budget = measure.Budget(options.budget, sum(request.parts for request in requests))
    # small requests first: large ones get the time that is left
    for request in sorted(requests, key=lambda request: request.flops):
        # one operation at a time: its results stay if a later one is interrupted
        _show(run.bench(request, **effort, budget=budget), options, console)
    return 0


def _bench_whole(module, options, restrictions: list[str]) -> int:
    """Time whole models: ``module`` is `models`, `train` or `engine`."""
    from rich.console import Console

    from research.benchmark import measure, run, step

    refused = [flag for flag in restrictions if flag != "--cases"] + ["--tune"] * options.tune
    if refused:
        raise ConfigError(f"op={options.op!r}: does not support {', '.join(refused)}")
    run.check_effort(options.rounds, options.seconds, options.budget)
    names = module.chosen(_names(options.cases))
    if options.record:
        step.check_quiet()
    results = module.bench(
        names,
        rounds=options.rounds,
        seconds=options.seconds,
        budget=measure.Budget(options.budget, len(names)),
    )
    _show(results, options, Console(highlight=False, markup=False))
    return 0


def _show(results, options, console) -> None:
    """Print the results, and write them to the files that ``options`` name."""
    from research.benchmark import record

    for line in [*record.machine_lines(results), record.LEGEND]:
        console.print(line, soft_wrap=True)
    for table in record.tables(results):
        console.print(table)
    for line in record.absences(results) + record.verdicts(results):
        console.print(line, soft_wrap=True)
    if options.record or options.out:
        paths = record.save(results, options.out or record.path(results["machine"]["device_kind"]))
        console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)


def _tuning_case(name: str, options) -> list[str] | None:
    """The case to tune on, in a list; None if the operation has none for this device."""
    import jax

    from research.benchmark import ops

    cases = _names(options.cases)
    if cases is None and name in ops.known():
        tuning = ops.known()[name].tuning.get(jax.default_backend())
        return None if tuning is None else [tuning.case]
    if cases is not None and len(cases) != 1:
        raise ConfigError(f"--cases={options.cases}: name one to --tune on")
    return cases


def _names(text: str | None) -> list[str] | None:
    """``a,b`` as a list; ``none`` as an empty list."""
    if text is None:
        return None
    return [] if text == "none" else text.split(",")


def _sizes(text: str | None) -> dict[str, int] | None:
    """``t=2048,h=4`` as a dict."""
    if text is None:
        return None
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {field: int(value) for field, value in pairs}
    except ValueError:
        raise ConfigError(f"--shape={text}: must be integer sizes, e.g. t=2048,h=4") from None
