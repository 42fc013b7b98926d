"""Learning a shape or an appearance from a few pictures: new tokens and low-rank weight offsets for a frozen model."""
