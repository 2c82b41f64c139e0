"""Checkpoint files, shared weights with a card, and transfer of weights between networks.

May import everything up to `data`.
"""
