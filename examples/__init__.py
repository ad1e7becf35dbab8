"""One runnable program per strategy on real data: ``python -m examples.NAME`` (``--quick`` on stand-ins)."""
