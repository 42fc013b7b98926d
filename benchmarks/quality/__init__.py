"""The table that settles every idea: methods times measures, on pairs whose true composition is known."""
