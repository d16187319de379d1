"""Search: the cheapest recipe that keeps the score, and the bits of every layer within a budget."""
