"""Shape and appearance of reference images inside a diffusion model: pure PyTorch, no user interface.

Host programs (ComfyUI, diffusers) are reached only through `inversion_core.hosts`.
"""
