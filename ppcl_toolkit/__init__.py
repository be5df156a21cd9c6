"""Compress Diffusion Transformers with PPCL (arXiv 2511.16156)."""
