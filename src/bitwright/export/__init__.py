"""Files for other runtimes, and the comparison with what they compute."""
