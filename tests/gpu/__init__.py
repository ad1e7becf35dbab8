"""Proofs on a CUDA device: `python -m tests.gpu` or `make prove-gpu` runs them all and writes one JSON file.

Nothing here has run on a GPU yet. What does not need one is tested by `tests/test_gpu_proof.py`.
"""
