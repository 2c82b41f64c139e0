"""Prediction with a checkpoint: whole images, tiles, regions, ensembles and CRFs; folders of images and videos.

May import everything up to `checkpoints`.
"""
