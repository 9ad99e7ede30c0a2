"""Training and evaluation: configuration, data, the Lightning module, callbacks and the report. See docs/training.md."""
