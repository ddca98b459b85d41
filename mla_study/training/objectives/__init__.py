"""One file an objective; each maps tensors to tensors and knows no optimiser and no model role."""
