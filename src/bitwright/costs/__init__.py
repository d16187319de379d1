"""What a choice costs: bytes, operations, energy, and seconds on this machine or on another."""
