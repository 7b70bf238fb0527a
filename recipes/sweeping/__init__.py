"""A table of experiments: what it asks for, what lies there, how its runs are started."""
