"""Text to corpora: a corpus is a table of fixed-length token rows, a score is a column of it. Imports no jax."""
