"""Makes bitsandbytes_8bit.npz, on the CPU: `pip install bitsandbytes==0.50.2`, then run this file.

bitsandbytes' compiled CPU kernel looks codes up in a table of its own that joins magnitudes below
1e-5; its kernels for float64 take the nearest code, as those for GPUs do. So that is what runs.
"""

from pathlib import Path

import numpy as np

SHAPE, STEPS, RATE = (20, 256), 12, 1e-2
BETAS, DECAY = (0.9, 0.95), 0.1


def numbers(seed: int, decades: float = 3) -> np.ndarray:
    """Of magnitudes that differ by as many powers of ten."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=SHAPE) * 10 ** rng.uniform(-decades, 0, SHAPE)).astype(np.float32)


def main():
    # here, so that tests can have the rest without it
    import bitsandbytes
    import torch
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.functional import create_dynamic_map

    nearest = torch.ops.bitsandbytes.quantize_blockwise

    def store(x, code, absmax_out, out_uint8, blocksize):
        codes, absmax = nearest(x.double(), code, blocksize)
        out_uint8.copy_(codes)
        absmax_out.copy_(absmax)

    ops._quant_blockwise_fp32_direct = store
    found = {}
    for name, signed in (("signed", True), ("unsigned", False)):
        code = create_dynamic_map(signed)
        x = torch.tensor(numbers(100, 8) if signed else np.abs(numbers(101, 8)))
        codes, absmax = nearest(x.double(), code, 256)
        back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 256, torch.float32)
        found |= {f"{name}/map": code, f"{name}/codes": codes, f"{name}/absmax": absmax}
        found |= {f"{name}/back": back}
    for name in ("AdamW", "Lion"):
        weight = torch.nn.Parameter(torch.tensor(numbers(102)))
        options = dict(lr=RATE, betas=BETAS, weight_decay=DECAY)
        optimizer = getattr(bitsandbytes.optim, f"{name}8bit")([weight], **options)
        for step in range(STEPS):
            weight.grad = torch.tensor(numbers(step))
            optimizer.step()
        state = optimizer.state[weight]
        assert state["state1"].dtype == torch.uint8
        found[f"{name}/weight"] = weight.detach()
        found[f"{name}/codes"] = state["state1"]
        if name == "AdamW":
            found[f"{name}/codes2"] = state["state2"]
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **{key: value.numpy() for key, value in found.items()})


if __name__ == "__main__":
    main()
