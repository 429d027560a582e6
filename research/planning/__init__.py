"""Planning: compile a step ahead of time for a named TPU slice, and read what it requires.

`topology` compiles, `program` reads the collectives, `plan` computes bytes, FLOPs and the shortest
possible time, `sweep` compares meshes and finds the largest batch, `report` prints plans.
"""
