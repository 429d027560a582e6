"""What ends the command: a signal at any moment, a reader that ends, a terminal that is gone."""

import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest

from tests.conftest import ROOT, environment

BEGIN = """
import hashlib, os, signal, sys, threading, time
from pathlib import Path
from research.cli import stop
from research.files import new_directory, write_text
stop.install()
stop.goes_on()
# this file alone: its package imports JAX
Stopping = __import__("runpy").run_path({path!r})["Stopping"]

def send(*numbers):
    for number in numbers:
        time.sleep(0.1)
        os.kill(os.getpid(), number)
"""
# the main thread runs no Python, as while XLA compiles
COMPILES = """
threading.Thread(target=send, args=({numbers}), daemon=True).start()
with new_directory(Path(sys.argv[1])) as fresh:
    write_text(fresh / "half", "")
    print("compiles")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
# an exception there would be lost
SWALLOWS = """
class Callback:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0.5)
Callback()
time.sleep(30)
"""
TRAINS = """
stopping = Stopping()
stopping.listen()
threading.Thread(target=send, args=({numbers}), daemon=True).start()
while not stopping.received:
    time.sleep(0.01)
try:
    time.sleep({saving})
except KeyboardInterrupt:
    stop.settle()
print("saved")
stopping.close()
time.sleep(30)
"""


def start(source, *arguments, before="", closed="", variables=None, **options):
    """Start ``source`` by a shell, after its commands ``before`` and without streams ``closed``."""
    begin = BEGIN.format(path=str(ROOT / "research/training/stopping.py"))
    command = [sys.executable, "-c", begin + source, *map(str, arguments)]
    return subprocess.Popen(
        ["sh", "-c", f'{before} exec "$@" {closed}', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options,
    )


STOPPED = "ablate: stopped; the same command continues from here\n"


@pytest.mark.parametrize("numbers", ["2,", "15,", "1,", "2, 2", "15, 15", "15, 2"])
def test_the_command_ends_while_the_main_thread_runs_no_python(tmp_path, numbers):
    began = time.monotonic()
    process = start(COMPILES.format(numbers=numbers), tmp_path / "new")
    out, error = process.communicate(timeout=60)
    first = int(numbers.split(",")[0])
    assert (process.returncode, out, error) == (128 + first, "compiles\n", STOPPED)
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())


def test_sigterm_ends_one_of_several_processes_before_its_first_step():
    """JAX's service for several processes has a handler of its own."""
    source = "from research.parallel import initialize\ninitialize()\nsend(15)\ntime.sleep(30)"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = dict(JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0", JAX_COORDINATOR_ADDRESS=address)
    process = start(source, variables={**several, "JAX_PLATFORMS": "cpu"})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error.endswith(STOPPED)


def test_a_signal_in_a_callback_is_not_lost():
    process = start(SWALLOWS.format(number=2))
    assert process.communicate(timeout=60) == ("", STOPPED) and process.returncode == 130


@pytest.mark.parametrize("numbers", ["2,", "15,", "1,", "15, 15, 1"])
def test_training_saves_before_the_command_ends(numbers):
    process = start(TRAINS.format(numbers=numbers, saving=0.5))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + int(numbers.split(",")[0]) and out == "saved\n"
    assert error == "ablate: stopping; saves first (Ctrl-C again: stops without saving)\n" + STOPPED


def test_a_second_ctrl_c_does_not_wait_for_the_save():
    process = start(TRAINS.format(numbers="2, 2", saving=30))
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and not out


def test_a_signal_to_a_forked_process_ends_it_alone():
    source = """
child = os.fork()
if not child:
    time.sleep(30)
    os._exit(0)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.2)
"""
    process = start(source)
    assert process.communicate(timeout=60) == ("-15\n", "") and process.returncode == 0


def test_an_error_while_the_command_ends_does_not_keep_it():
    source = "stop.remove_temporaries = lambda: 1 / 0\nsend(15)\nstop.settle()"
    process = start(source)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_ignored_signals_stay_ignored():
    """As of a shell's background job, and under nohup."""
    source = "send(1, 2)\nlistening = Stopping()\n"
    source += "listening.listen()\nsend(1, 2)\nprint(listening.received)"

    process = start(source, before='trap "" INT HUP;')
    assert process.communicate(timeout=60) == ("[]\n", "") and process.returncode == 0


def test_a_reader_that_ends_stops_the_command_quietly():
    lines = "for number in range(10**6): print(number)\nstop.settle()"
    trains = """
stopping = Stopping()
stopping.listen()
while not stopping.received:
    print("step")
print("saved", file=open(sys.argv[1], "w"))
stopping.close()
time.sleep(30)
"""
    for source, saved in ((lines, False), (trains, True)):
        read, write = os.pipe()
        process = start(source, "/dev/stderr", stdout=write)
        os.close(write)
        assert os.read(read, 2)
        os.close(read)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 141
        assert "saved\n" in error if saved else error == ""


def test_a_full_disk_behind_the_output_is_named():
    with open("/dev/full", "w") as full:
        process = start('print("verdict")\ntime.sleep(30)', stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 141
    assert error == "ablate: the output cannot be written: No space left on device\n"


def test_a_terminal_that_is_gone_lets_training_save(tmp_path):
    source = TRAINS.replace("threading.Thread(", "print('step')\nif {numbers}: threading.Thread(")
    source = source.replace('print("saved")', "print('s' * 10); Path(sys.argv[1]).touch()")
    saved = tmp_path / "saved"
    here, there = pty.openpty()
    owned = f"import fcntl; fcntl.ioctl(0, {termios.TIOCSCTTY}, 0)\n"  # the session's terminal
    source = owned + source.format(numbers="()", saving=0.1)
    process = start(source, saved, stdin=there, stdout=there, stderr=there, start_new_session=True)
    os.close(there)
    assert os.read(here, 4) == b"step"
    os.close(here)  # the kernel sends SIGHUP to the session of this terminal
    assert process.wait(timeout=60) == 129
    assert saved.exists()


def test_streams_that_are_closed_or_lack_a_character():
    source = """
file = open(sys.argv[1], "w")
assert file.fileno() > 2
print("a ± b ≤ c │"); print("≤", file=sys.stderr)
"""
    process = start(source, os.devnull, closed="<&- >&- 2>&-")
    assert process.wait(timeout=60) == 0
    for encoding, shown in (("cp1252", "a ± b ? c ?"), ("ascii", "a ? b ? c ?")):
        process = start(source, os.devnull, variables={"PYTHONIOENCODING": encoding}, text=False)
        told = process.communicate(timeout=60)
        assert told == (f"{shown}\n".encode(encoding), b"\\u2264\n")
        assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.5, 2, 4, 6, 8, 10])
def test_a_cold_run_ends_at_any_moment(tmp_path, number, seconds):
    """With nothing compiled before: a process that finalises while XLA compiles crashes."""
    words = ["run", "architecture/gqa", "--scale=smoke", "--arms=mha", "--seeds=0"]
    words += [f"--workdir={tmp_path}", "--config.training.steps=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "research.cli", *words],
        env=environment(1) | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(seconds)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, error
    assert error.endswith(STOPPED) and error.count("ablate: stopped") == 1
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".orbax"]
