"""One commented YAML file per shipped job."""
