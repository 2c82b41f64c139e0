"""A network layer by layer: tracing without data, shapes and costs, exact receptive fields.

May import everything up to `models`.
"""
