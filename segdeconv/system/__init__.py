"""The machine: devices and precision, memory, files written whole, keys for random numbers.

May import `errors` alone.
"""
