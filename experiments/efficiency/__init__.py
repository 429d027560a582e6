"""Ablations of memory and time: the savings and the cost of a technique."""
