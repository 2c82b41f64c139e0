"""From a checkpoint to class scores of any image: whole, tiled, by regions, ensemble, CRF; many images and videos.

May import everything up to `checkpoints`.
"""
