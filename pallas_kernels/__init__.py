"""Kernels: one folder for each operation, one file for each implementation.

``op(..., implementation=None)`` runs ``reference`` (the equation), ``xla`` (in chunks, with little
memory, on every platform), ``tpu`` (Pallas, Mosaic TPU) or ``gpu`` (Pallas, Triton; NVIDIA GPUs).
None is the kernel of the platform that the program is lowered for, or ``xla`` if that kernel does
not support the call. A named implementation that does not support the call raises an error with
the reason.

From version 0.12 jax warns that a later version will remove its lowering to Triton.
"""
