"""Ablations of a decoder's parts: positions, attention, and their cost."""
