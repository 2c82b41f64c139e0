"""What trained networks do: switch paths and stability, ablation, unit projection, uncertainty, figures.

May import everything up to `evaluation` and `export`.
"""
