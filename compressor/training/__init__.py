"""Training, fine-tuning and scoring of networks."""
