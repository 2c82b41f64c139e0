"""Training runs: task, trainer, checkpoints, callbacks, resuming, config checks, loggers, processes.

May import everything up to `analysis`.
"""
