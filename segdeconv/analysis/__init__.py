"""Analysis of trained networks: switch paths and stability, ablation, unit projection, uncertainty, figures.

May import everything up to `evaluation` and `export`.
"""
