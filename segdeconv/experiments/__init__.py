"""Tables of many runs, and benchmarks. Only scripts import it; training and prediction do not need it.

May import everything up to `train`.
"""
