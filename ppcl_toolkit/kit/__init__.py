"""What helps to write an adapter: a transformer looked at while it runs."""
