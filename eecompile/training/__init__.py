"""Training what was inserted, and measuring it. Import from the modules: `fit`, `evaluate`, `objectives`."""
