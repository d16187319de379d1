"""Search for the cheapest recipe that keeps the score, with a stated confidence."""
