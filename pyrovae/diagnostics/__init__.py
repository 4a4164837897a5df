"""What a model learned, and where it loses nats."""
