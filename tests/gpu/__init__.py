"""Proofs and benchmark on a CUDA device: `make gpu`. `tests/test_gpu_proof.py` tests their drivers."""
