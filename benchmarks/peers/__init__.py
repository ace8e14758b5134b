"""This engine beside PEFT and vLLM: one model, one set of adapters, one file of requests.

`python -m benchmarks.peers` makes the inputs, runs every contender in a process of its own, and
writes `benchmarks/results/peers.{json,md,png}`. Contenders share `job`, plain values in JSON, and
nothing else: each module `run_*` runs in its own environment and imports only what is there.
"""
