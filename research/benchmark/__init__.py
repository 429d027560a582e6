"""How fast an op of `pallas_kernels` is beside its peers, measured in one run, round by round."""
