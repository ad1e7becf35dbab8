"""Benchmarks: time and memory of rewritten programs against named rivals, as ratios in one run.

Run by `make bench` or `python -m tests.bench`; `--only GROUP` runs one group. `groups.py` is the list.
"""
