"""Who runs when, in which pages, and how a prompt is cut: the decisions of the host. No JAX."""
