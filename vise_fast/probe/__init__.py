"""What the base can do before it is trained, on the user's own pictures, per prompt style."""
