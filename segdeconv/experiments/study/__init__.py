"""The SegNet paper's decoder study: eight networks under one recipe, its table 1 made anew."""
