"""Kernels: one folder an op, one file an implementation. Pure JAX in, pure JAX out.

``op(..., implementation=None)`` runs ``reference`` (the equation, naive), ``xla`` (chunked, lean in
memory, everywhere), ``tpu`` (Pallas, Mosaic TPU) or ``gpu`` (Pallas, Triton; NVIDIA's). None is the
kernel of whichever platform the program is lowered for, or ``xla`` where that kernel cannot serve
the call. A named implementation that cannot serve raises and says why.

From version 0.12 jax warns that its lowering to Triton will be removed one day.
"""
