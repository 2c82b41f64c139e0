"""Max-pooling that records the winning cell of each 2x2 window, and unpooling into it: functions, modules and kernels.

May import `errors` alone.
"""

from segdeconv.switches.modules import MaxPool, Unpool
from segdeconv.switches.ops import Pooling, max_pool, unpool
from segdeconv.switches.packing import pack, unpack

__all__ = ["MaxPool", "Pooling", "Unpool", "max_pool", "pack", "unpack", "unpool"]
