"""Run a teacher block by block: its calls, its noise, its pictures."""
