"""Methods side by side on equal terms: the same teacher, samples, sizes, block passes, prompts and noise for all."""
