"""The target ``onnx`` on this machine."""
