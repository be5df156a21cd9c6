"""The benchmarks of the paper: images where official scorers look for them, and their scores read back."""
