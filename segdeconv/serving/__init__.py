"""A page on this machine to try a network: drop a picture, see what it is made of.

May import everything up to `training`.
"""
