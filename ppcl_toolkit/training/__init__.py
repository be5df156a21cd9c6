"""What learns: losses, segments, optimizer steps."""
