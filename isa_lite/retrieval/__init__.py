"""Galleries, queries, ranks and metrics."""
