"""Quantization-aware training: the three-phase schedule and a plain loop."""
