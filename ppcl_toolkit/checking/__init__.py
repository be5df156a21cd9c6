"""Adapter against pipeline: what would make a wrong model in silence is found on one recorded call, in seconds."""
