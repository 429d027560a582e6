"""Compiled programs in a folder: loaded without compiling, and refused where anything differs."""

from research.inference.compiled.stamp import make_stamp
from research.inference.compiled.store import Compiler, Program, load, save

__all__ = ["Compiler", "Program", "load", "make_stamp", "save"]
