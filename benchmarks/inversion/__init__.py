"""Shapes and appearances learned from one picture each on the demo model, judged by the demo world's truth."""
