"""Export of networks as ONNX or torch.export files, verified against the network.

May import everything up to `inference`.
"""
