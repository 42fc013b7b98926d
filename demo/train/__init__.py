"""How the demo's weights are made from nothing: ``python -m demo.train``."""
