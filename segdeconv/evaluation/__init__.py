"""Scores of a network on a split: metrics, boundaries, calibration, breakdown, the report and its page.

May import everything up to `inference`.
"""
