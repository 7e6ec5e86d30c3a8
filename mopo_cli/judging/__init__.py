"""What judges say of responses: preference models, scorers and computed objectives."""
