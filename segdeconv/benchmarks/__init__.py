"""What the project says of its own speed, as functions that measure it."""
