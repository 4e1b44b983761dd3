"""The constrained agent: PPO with a Lagrange multiplier for each budget."""
