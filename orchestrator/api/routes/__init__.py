"""Routes by group."""
