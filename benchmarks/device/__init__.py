"""What to run first on a machine with a GPU, where there may be minutes only.

`python -m benchmarks.device` runs parts in the order of their value. Each has a time box and a
process of its own and leaves its result before the next begins; see ``parts``.
"""
