"""How fast and how large the networks are here, measured against how they are usually written."""
