"""Kernels: one folder an op, one file an implementation. Pure JAX in, pure JAX out.

``op(..., implementation=None)`` runs ``reference`` (the equation, naive), ``xla`` (chunked, lean in
memory, everywhere), ``tpu`` (Pallas, Mosaic TPU) or ``gpu`` (no op has one yet). None is the kernel
of whichever platform the program is lowered for, or ``xla`` where that kernel cannot serve the
call. A named implementation that cannot serve raises and says why.
"""
