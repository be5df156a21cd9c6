"""Which candidates go for which target: measured errors in, a plan for every target out."""
