"""Models of all kinds, and what must come back of them."""
