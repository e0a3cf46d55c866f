"""Device rates and sizes."""
