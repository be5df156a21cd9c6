"""Plans become modules, and modules become source."""
