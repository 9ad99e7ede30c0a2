"""Using a trained model: load any checkpoint, predict, compare two."""
