"""The SegNet paper's decoder study: eight networks trained with one config, and the paper's table 1 reproduced."""
