"""Image and mask files: decoding, channels, downloads and archives.

Must not import anything else of `segdeconv.data`.
"""
