"""The verbs: prepare, calibrate, convert, save, load, evaluate, coverage."""
