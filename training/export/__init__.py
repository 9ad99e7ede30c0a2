"""Handing a trained model on: timm's format and the hub, torch.export, ONNX."""
