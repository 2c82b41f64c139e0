"""Evaluation of a network on a split: metrics, boundary scores, calibration, breakdown and reports.

May import everything up to `inference`.
"""
