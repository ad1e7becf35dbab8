"""Saved programs: a directory of JSON, safetensors and `.pt2` files, without a pickle that runs code."""
