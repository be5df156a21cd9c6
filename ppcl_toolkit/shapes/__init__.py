"""The embedded default: captioned scenes, their scorer, and the small teacher trained on them."""
