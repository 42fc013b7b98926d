"""The embedded demo: a synthetic world, the small models trained on it, and the runner that shows them."""
