"""Executors: how a rewritten program is run."""
