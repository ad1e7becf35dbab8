"""The benchmark of the device executor: rivals on the same GPU, and the decision's kernel.

A part of `make gpu`. The same driver runs on the CPU with tiny models, which is how it is tested: figures of such a run say
nothing.
"""
