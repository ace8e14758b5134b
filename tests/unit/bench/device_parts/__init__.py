"""Parts for ``benchmarks.device`` that fail, crash and hang."""
