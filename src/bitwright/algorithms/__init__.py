"""What improves a quantized model without training it: each file one method, named in ``plan.steps``."""
