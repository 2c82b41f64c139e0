"""Speed and memory of the networks, compared with the usual implementation of SegNet."""
