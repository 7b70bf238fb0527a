"""Read a model: a copy without weights, one recorded forward, its stages and sites."""
