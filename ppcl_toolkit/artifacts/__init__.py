"""What lies on disk: runs, banks, pipelines and variants, and how they are opened again."""
