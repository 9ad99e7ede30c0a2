"""Training and evaluation: configuration, data, Lightning module, callbacks, report. See docs/training.md."""
