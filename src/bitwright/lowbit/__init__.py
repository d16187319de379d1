"""Shipped layers: packed codes and a kernel."""
