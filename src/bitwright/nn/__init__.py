"""Simulated layers: what is trained."""
