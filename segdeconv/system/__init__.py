"""Machine-level services: devices and precision, memory, atomic file writes, and seeds of random numbers.

May import only `errors`.
"""

# The environment variable that lets a command, and every process it starts, tune the C library's malloc.
KEEP_FREED = "SEGDECONV_KEEP_FREED_MEMORY"
