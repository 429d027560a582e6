"""Flash attention on an NVIDIA GPU: no kernel yet. Calls are refused; None takes ``xla``."""


def refusal(q, k, v, q_positions, k_positions, q_segments, k_segments, slopes, sinks) -> str:
    """Why the kernels cannot serve this call."""
    return "it has no GPU kernel yet"


def forward(*_):
    """Never reached: every call is refused."""
    raise NotImplementedError


backward = forward
