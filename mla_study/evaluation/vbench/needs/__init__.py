"""What scorers need: an environment, weights, and a doctor that says what is missing."""
