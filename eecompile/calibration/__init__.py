"""Temperatures and thresholds with a guarantee. Import from the modules: `calibrate`."""
