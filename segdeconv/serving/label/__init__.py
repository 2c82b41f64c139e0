"""A local page that teaches a network by painting: strokes, what it learns from them, proposals and their storage.

May import everything up to `training`.
"""
