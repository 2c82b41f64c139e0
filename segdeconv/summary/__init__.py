"""Summary of a network layer by layer: tracing without data, shapes, costs and exact receptive fields.

May import everything up to `models`.
"""
