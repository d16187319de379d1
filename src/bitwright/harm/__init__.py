"""Harm: what the spec of one site does to a model whose other sites stay in float, and what lies behind it."""
