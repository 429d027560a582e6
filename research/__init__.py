"""Procedures: everything with a loop, a loss, data, a mesh or I/O. Built on `layers`."""
