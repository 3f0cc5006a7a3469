"""Scripts that make the numbers and the embedded models; run them from the root of a checkout."""
