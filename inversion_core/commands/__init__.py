"""Programs of the core for a terminal, without ComfyUI."""
