"""The masks of the paper: what each method drops, at which rate, and the kernel."""
