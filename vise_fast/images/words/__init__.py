"""Words of the user's own, asked for instead of the model's queries."""
