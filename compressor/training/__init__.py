"""Training, evaluation, distillation and alignment."""
