"""These tests compute on one thread."""

from nets import one_thread as one_thread
