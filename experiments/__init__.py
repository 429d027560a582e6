"""Does the claim hold? One file a paper's ablation: arms, seeds, claims; no algorithm."""
