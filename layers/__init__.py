"""What function? Pure functions of arrays, each beside the thin `nnx.Module` with its weights."""
