"""The only training loop, and the stages before and under every method."""
