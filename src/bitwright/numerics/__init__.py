"""Number formats, specs, encode and decode, packing: pure functions on tensors."""
