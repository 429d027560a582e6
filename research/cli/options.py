"""What several commands read from their options, and how they run quietly."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from layers.config import ConfigError, check

# folders below RUN that are searched for a model: ARM/SEED, and a stage of an arm with several
_DEPTH = 3


def number(kind, option: str, text: str):
    """``text`` as ``kind``, int or float; raises `ConfigError`."""
    try:
        return kind(text)
    except ValueError:
        name = "an integer" if kind is int else "a number"
        raise ConfigError(f"{option}={text!r}: must be {name}") from None


def model_folder(run: Path, option: str = "run") -> Path:
    """The folder with a model: ``run``, or the only such folder below it; ``option`` gave it.

    Raises:
      ConfigError: there is no such folder, or there are several; the message names them.
    """
    check(run.is_dir(), option, str(run), "is not a folder")
    if (run / "config.json").is_file():
        return run
    depths = ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1))
    folders = sorted(
        path.parent
        for depth in depths
        for path in run.glob(f"{depth}/config.json")
        if (path.parent / "checkpoints").is_dir()
    )
    check(len(folders) > 0, option, str(run), "holds no trained model")
    names = ", ".join(str(path.relative_to(run)) for path in folders)
    check(len(folders) == 1, option, str(run), f"holds several models; add one of {names}")
    print(f"ablate: {folders[0]}", file=sys.stderr)
    return folders[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard the standard error of the process: libtpu reports there that it found no TPU."""
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def language_model_config(folder: Path):
    """The `DecoderConfig` of the model in ``folder``; no weights are read.

    Raises:
      ConfigError: it cannot be read.
    """
    from research.convert import directory_config
    from research.models.companions import is_hugging_face
    from research.training import model_config

    return directory_config(folder) if is_hugging_face(folder) else model_config(folder)


def load_language_model(folder: Path):
    """The `Decoder` in ``folder``: of a run, an imported checkpoint, or a Hugging Face directory.

    Raises:
      ConfigError: it cannot be read, or is no language model.
    """
    import jax

    from research.convert import load_directory
    from research.models.companions import is_hugging_face
    from research.training import load_model

    model = load_directory(folder) if is_hugging_face(folder) else load_model(folder)
    outputs = model.config.outputs
    check(outputs is None, "model.outputs", outputs, "generation requires a language model")
    if len(jax.devices()) > 1:  # generation runs on one device
        model = jax.device_put(jax.device_get(model), jax.devices()[0])
    return model


def check_state(models, config, option: str, value: int) -> None:
    """Raise `ConfigError` if memory cannot hold the state of an engine of ``config``.

    Else XLA may wait for ever to allocate it. ``models``: the model, and what drafts for it.
    """
    import jax

    from research.inference.engine.programs import new_memory
    from research.memory import device_memory, spell

    state = jax.eval_shape(lambda: new_memory(models, config).states)
    needed = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    memory = device_memory(jax.devices()[0])
    if memory is not None:
        sizes = f"{spell(needed)} of state must fit into {spell(memory)} of memory"
        check(needed <= memory, option, value, sizes)


def add_draft_options(parser) -> None:
    what = "a smaller model with the same tokens that drafts: faster, by the same law"
    parser.add_argument("--draft", metavar="RUN", help=what)
    what = "draft what followed the last A to B tokens where they were before, e.g. 2:5"
    parser.add_argument("--ngram", metavar="A:B", help=what)


def draft_options(options) -> tuple[Path | None, tuple[int, int] | None]:
    """The folder of ``--draft``, and ``--ngram=A:B`` as numbers; at most one is given.

    Raises:
      ConfigError: both are given, or one is not valid.
    """
    if options.ngram is None:
        given = options.draft
        return None if given is None else model_folder(Path(given), "draft"), None
    check(options.draft is None, "ngram", options.ngram, "cannot be given with draft")
    least, _, most = options.ngram.partition(":")
    valid = least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)
    check(valid, "ngram", options.ngram, "must be A:B, numbers of tokens with 1 ≤ A ≤ B")
    return None, (int(least), int(most))


def load_speculative(folder: Path | None, ngram: tuple[int, int] | None):
    """The `Speculative` of what `draft_options` found, or None."""
    from research.inference.engine import Speculative

    if folder is None and ngram is None:
        return None
    return Speculative(None if folder is None else load_language_model(folder), ngram)
