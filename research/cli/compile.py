"""``ablate compile``: an engine's programs, compiled once and loaded by those who serve a model."""

import argparse
import contextlib
import sys
from pathlib import Path

from research.cli.engine_options import add_engine_options, engine_config
from research.cli.options import language_model_config, model_folder, quiet

_EXAMPLES = """examples:
  ablate compile runs/qwen3 --to=compiled/qwen3 --slots=16 --max-length=4096
  ablate compile runs/qwen3 --to=compiled/v5e --topology=v5e:2x2      # no TPU is required
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile the programs that serve a model, for this device or a TPU slice",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "the folder of a unit, of a run with one unit, or of a checkpoint; or Hugging Face's"
    parser.add_argument("run", metavar="RUN", type=Path, help=what)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")
    what = "a TPU slice, e.g. v5e:2x2, whose chips share the heads; default: this process's device"
    parser.add_argument("--topology", metavar="SLICE", help=what)
    add_engine_options(parser)
    parser.set_defaults(command=_compile)


def _compile(options) -> int:
    import jax
    from flax import nnx

    from layers.decoder import Decoder
    from research.files import check_new
    from research.inference.engine.compiled import save_programs
    from research.memory import spell

    check_new(options.to)
    model = language_model_config(model_folder(options.run))
    config = engine_config(options, model)
    weights = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    mesh = compiler = None
    with quiet() if options.topology else contextlib.nullcontext():
        if options.topology:
            from research.parallel import MeshConfig, shardings, validate_model
            from research.planning.topology import compile_for_tpu, topology_mesh

            mesh = topology_mesh(options.topology, MeshConfig(data=1, tensor=-1))
            validate_model(model, mesh)
            weights = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                weights,
                shardings(weights, mesh),
            )
            compiler = compile_for_tpu
        else:
            print("ablate: compiling", file=sys.stderr)
        save_programs(options.to, weights, config, mesh=mesh, compiler=compiler)
    files = [path for path in options.to.iterdir() if path.suffix == ".executable"]
    size = sum(path.stat().st_size for path in files)
    print(f"written: {options.to} ({len(files)} programs, {spell(size)})")
    return 0
