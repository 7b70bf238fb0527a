"""Training: settings, the run and its parts, its folder."""
