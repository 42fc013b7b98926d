"""Measurements, each one command; every figure in the documentation comes from one of them."""
