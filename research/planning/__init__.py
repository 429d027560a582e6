"""Before there are machines: a step compiled ahead of time for a slice by name, and what it needs.

`topology` compiles, `program` reads the collectives, `plan` puts bytes, FLOPs and time at best
together, `sweep` compares meshes and finds the largest batch, `report` says it.
"""
