"""Models of random weights, and what times them."""
