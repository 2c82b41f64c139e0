"""A page on this machine to try a network: drop a picture, see what it is made of."""
