"""What may be removed from a network, what that costs, and the smaller network."""
