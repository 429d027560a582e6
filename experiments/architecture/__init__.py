"""Ablations of a decoder's parts: positions, attention, and what they cost."""
