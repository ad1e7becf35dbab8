"""The benchmark of the device executor: rivals on the same GPU, the decision's kernel, and the cost of conditional nodes.

A part of `make gpu`. The same driver runs on the CPU with tiny models, which is how it is tested: figures of such a run say
nothing.
"""
