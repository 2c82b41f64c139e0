"""A network as one ONNX or torch.export file, compared with the network before it gets its name.

May import everything up to `inference`.
"""
