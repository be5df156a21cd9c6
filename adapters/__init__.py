"""One file per model family, each exporting ADAPTER."""
