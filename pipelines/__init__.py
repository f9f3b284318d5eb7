"""What changes the sampling loop or knows a model family."""
