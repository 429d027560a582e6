"""How, fast, on this chip? Pure JAX in, pure JAX out; knows nothing of Flax."""
