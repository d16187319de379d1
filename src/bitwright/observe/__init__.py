"""From tensors to ranges: observers for streams, range search for weights."""
