"""The SegNet paper's decoder study: eight networks under one config, its table 1 made anew."""
