"""A local web page to try a network: drop an image on it and explore the prediction.

May import everything up to `training`.
"""
