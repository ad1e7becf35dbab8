"""Decisions that stay on the device: a call as one program of kernels and conditions, without a value on the host."""
