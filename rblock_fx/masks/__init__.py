"""The masks of the paper: what each method draws, at which rate, and how it is applied."""
