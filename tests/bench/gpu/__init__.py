"""The benchmark of the device executor: rivals on the same GPU, kernels, and the cost of conditional nodes.

`make bench-gpu` or `python -m tests.bench.gpu`; `plan.py` is the list of its parts. The same driver runs on the CPU with
tiny models (`--device cpu --small`), which is how it is tested: figures of such a run say nothing.
"""
