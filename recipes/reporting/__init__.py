"""A report on runs: what is there, statistics, text, pictures, page."""
