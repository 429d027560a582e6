"""Does the claim hold? One file per paper, with arms, seeds and claims; no algorithm."""
