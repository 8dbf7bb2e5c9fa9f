"""The models that the papers study."""
