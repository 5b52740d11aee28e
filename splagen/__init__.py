"""splagen."""
