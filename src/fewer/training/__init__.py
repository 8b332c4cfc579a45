"""What training a reduced model needs besides the model: losses, costs with gradients, schedules."""
