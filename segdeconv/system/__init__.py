"""Machine-level services: devices, memory, atomic file writes, signals, standard streams, random seeds.

May import only `errors`.
"""

# The environment variable that lets a command, and every process it starts, tune the C library's malloc.
KEEP_FREED = "SEGDECONV_KEEP_FREED_MEMORY"
