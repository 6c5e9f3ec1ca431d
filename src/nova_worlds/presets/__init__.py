"""The measured scores and speeds of the sampling presets on the emoji world."""
