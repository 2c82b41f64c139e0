"""The machine: devices and precision, memory, files written whole, keys for random numbers.

May import `errors` alone.
"""

# The environment variable by which a command, and every process that it starts, may tune the C library's malloc.
KEEP_FREED = "SEGDECONV_KEEP_FREED_MEMORY"
