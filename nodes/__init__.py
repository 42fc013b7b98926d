"""What an artist sees: ComfyUI nodes, each a thin layer over the core."""
