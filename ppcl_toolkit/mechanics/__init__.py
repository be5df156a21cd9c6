"""What the stages are made of: no recipe knowledge, no family names."""
