"""The meaning of every operator, its native kernels, and the table that chooses."""
