"""``ablate import`` and ``ablate export``: convert Hugging Face directories and checkpoints."""

import argparse
from pathlib import Path

_EXAMPLES = """examples:
  ablate import models/Qwen3-0.6B --to runs/qwen3      # `load_model` and `train(init=…)` read it
  ablate export runs/qwen3 --to exported/qwen3         # transformers reads it
  ablate export runs/mine --family=llama --to exported/mine
  ablate import models/RWKV-x070-World-0.1B.pth --to runs/rwkv7
  ablate export runs/rwkv7 --to exported/rwkv7.pth   # the rwkv package reads it
"""

# dtype of the parameters → what training does with them
_IN_TRAINING = {
    "float32": "",
    "bfloat16": "; training updates a float32 copy of them, with training.optimizer.master=True",
    "float16": "; training does not support it: import with --param-dtype=bfloat16 to fine-tune",
}


def add(commands) -> None:
    """Add the two commands to argparse's ``commands``."""
    parser = _parser(commands, "import", "convert a Hugging Face directory to a checkpoint")
    what = "config.json and weights, or an RWKV-7 .pth file"
    parser.add_argument("source", metavar="DIR", type=Path, help=what)
    parser.add_argument("--to", metavar="CKPT", type=Path, required=True, help="a new folder")
    parser.add_argument("--param-dtype", help="e.g. float32; default: the dtype in config.json")
    what = "tokens that a rope_type of longrope or dynamic is for; default: see docs/models.md"
    parser.add_argument("--context", type=int, metavar="N", help=what)
    parser.set_defaults(command=_import)

    parser = _parser(commands, "export", "convert a checkpoint to a Hugging Face directory")
    parser.add_argument("source", metavar="CKPT", type=Path, help="imported, or a run's workdir")
    what = "a new folder, or a new .pth file for RWKV-7"
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help=what)
    parser.add_argument("--family", help="e.g. llama; default: the family of the imported model")
    parser.set_defaults(command=_export)


def _parser(commands, name: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=description,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _import(options) -> int:
    from research.convert import import_directory

    dtype = import_directory(
        options.source, options.to, param_dtype=options.param_dtype, context=options.context
    )
    print(f"written: {options.to}")
    print(f"parameters: {dtype}{_IN_TRAINING[dtype]}")
    return 0


def _export(options) -> int:
    from research.convert import export_checkpoint

    export_checkpoint(options.source, options.to, family=options.family)
    print(f"written: {options.to}")
    return 0
