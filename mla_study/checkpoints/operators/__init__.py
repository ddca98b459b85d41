"""Finding the attention operators in a bag of tensors."""
