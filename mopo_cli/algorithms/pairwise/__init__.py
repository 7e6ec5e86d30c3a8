"""Methods that learn from labelled pairs."""
