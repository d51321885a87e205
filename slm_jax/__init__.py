"""Train language models on the tokens that matter: selective, metadata-conditioned and continual training in JAX."""
