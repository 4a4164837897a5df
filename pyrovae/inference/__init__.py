"""What a model and a guide hold, and their importance weights."""
