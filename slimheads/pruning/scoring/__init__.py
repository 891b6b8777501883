"""One score per unit: one file per method, and the function that chooses among them."""
