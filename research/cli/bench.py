"""``ablate bench``: kernels, whole models and the training loop, timed beside their peers."""

import argparse
from pathlib import Path

from layers.config import ConfigError

_BENCH = """examples:
  ablate bench flash_attention --cases=t1024 --budget=60
  ablate bench flash_attention --shape=t=2048,h=4 --dtype=bfloat16 --peers=none
  ablate bench wkv7 --tune                    # this chip's row of pallas_kernels/wkv/blocks.json
  ablate bench --all --record --budget=1800   # pallas_kernels/results: JSON, page and plots
  ablate bench models --cases=llama,mamba2    # a training step beside transformers', on a CPU
  ablate bench train                          # the same decoder in plain PyTorch, and our loop
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a kernel, models or training beside peers on this machine",
        epilog=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "op", metavar="OP", nargs="?", help="an op, e.g. flash_attention; or models, or train"
    )
    parser.add_argument("--all", action="store_true", help="every op, one after the other")
    parser.add_argument("--cases", help="names with commas between; default: all")
    parser.add_argument("--shape", help="other sizes for the first case, e.g. t=2048,h=4")
    parser.add_argument("--dtype", help="another dtype, e.g. bfloat16")
    parser.add_argument("--implementations", help="like --cases")
    parser.add_argument("--peers", help="like --cases, or none")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timings, then one sits out")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for all of it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="find block sizes for this chip")
    what.add_argument("--record", action="store_true", help="into the chip's file of results")
    what.add_argument("--out", type=Path, help="into this JSON file, its page and plots beside it")
    parser.set_defaults(command=_bench)


def _bench(options) -> int:
    from rich.console import Console

    from research.benchmark import measure, models, ops, run, train, tune

    whole = {module.NAME: module for module in (models, train)}
    if options.all == (options.op is not None):
        known = ", ".join((*ops.known(), *whole))
        raise ConfigError(f"op={options.op!r}: name one of {known}, or give --all alone")
    narrowed = [
        f"--{field}"
        for field in ("cases", "shape", "dtype", "implementations", "peers")
        if getattr(options, field) is not None
    ]
    if narrowed and (options.all or options.record):
        given = "--all" if options.all else "--record"
        raise ConfigError(f"{given}: runs everything; leave out {', '.join(narrowed)}")
    if options.op in whole:
        return _bench_whole(whole[options.op], options, narrowed)
    if options.tune and options.all:
        raise ConfigError("--all: name one op to --tune")
    run.check_effort(options.rounds, options.seconds, options.budget)
    # everything that is asked for is checked before anything runs
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
        found = tune.tune(requests[0], **effort, budget=measure.Budget(options.budget, 1))
        console.print(tune.table(found))
        console.print(tune.save(found), soft_wrap=True)
        return 0
    budget = measure.Budget(options.budget, sum(one.parts for one in requests))
    # what the small ones leave is for the large
    for one in sorted(requests, key=lambda one: one.flops):
        # op by op: what was measured stays if the rest is interrupted
        _show(run.bench(one, **effort, budget=budget), options, console)
    return 0


def _bench_whole(module, options, narrowed: list[str]) -> int:
    """Training steps of whole models: ``module`` is `models` or `train`."""
    from rich.console import Console

    from research.benchmark import measure, run, step

    refused = [flag for flag in narrowed if flag != "--cases"] + ["--tune"] * options.tune
    if refused:
        raise ConfigError(f"op={options.op!r}: knows nothing of {', '.join(refused)}")
    run.check_effort(options.rounds, options.seconds, options.budget)
    names = module.chosen(_names(options.cases))
    if options.record:
        step.check_quiet()
    found = module.bench(
        names,
        rounds=options.rounds,
        seconds=options.seconds,
        budget=measure.Budget(options.budget, len(names)),
    )
    _show(found, options, Console(highlight=False, markup=False))
    return 0


def _show(found, options, console) -> None:
    """Print what was ``found``, and write it where ``options`` say."""
    from research.benchmark import record

    for line in [*record.machine_lines(found), record.LEGEND]:
        console.print(line, soft_wrap=True)
    for table in record.tables(found):
        console.print(table)
    for line in record.absences(found) + record.verdicts(found):
        console.print(line, soft_wrap=True)
    if options.record or options.out:
        written = record.save(found, options.out or record.path(found["machine"]["device_kind"]))
        console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def _tuning_case(name: str, options) -> list[str] | None:
    """The one case to tune on."""
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
    """``a,b`` as a list; ``none`` as an empty one."""
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
        raise ConfigError(f"--shape={text}: must be sizes like t=2048,h=4, integers") from None
