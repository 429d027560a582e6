"""Ablations of memory and time: what a technique saves and what it costs."""
