"""Layers: pure functions of arrays, each with a thin `nnx.Module` that declares its parameters."""
