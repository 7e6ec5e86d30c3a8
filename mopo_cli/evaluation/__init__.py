"""What a policy is worth: responses, measurements, verdicts and what tells of them."""
