"""What is fast and what is not, measured beside what else there is, in one run."""
