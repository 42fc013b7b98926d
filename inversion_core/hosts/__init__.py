"""Hosts: what carries an `Injection` out on a particular kind of model."""
