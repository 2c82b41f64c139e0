"""Tables of many runs, and benchmarks. Only scripts import it: nothing needs it to train or predict.

May import everything up to `train`.
"""
