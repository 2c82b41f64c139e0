"""Checkpoint files, and weights with a card: written whole, verified, plain data; starting from another network.

May import everything up to `data`.
"""
