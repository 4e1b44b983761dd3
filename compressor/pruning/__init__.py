"""What may be removed from a network, what it costs, and how it is removed."""
