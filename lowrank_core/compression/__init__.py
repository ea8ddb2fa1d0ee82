"""From factors and an allocation to a smaller model."""
