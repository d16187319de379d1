"""Decisions: sites, presets, targets, and the plan file."""
