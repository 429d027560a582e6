"""Versions, device and commit of a run, for every record; no path is recorded."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """Versions, platform, devices, commit and whether files differ from it, in JSON's types.

    The last two are None outside a git checkout or without git.
    """
    devices = jax.devices()
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "device": devices[0].device_kind if devices[0].platform != "cpu" else _cpu(),
        "devices": len(devices),
        "processes": jax.process_count(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of ``config`` as canonical JSON, 16 hexadecimal digits."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({len(models)} cores)" if models else platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
