"""From conditions to latents, frame by frame and set by set. `generate.py` has the loop over frames and sets,
`diffusion.py` denoises one set, `guidance.py` combines passes. `state.py` holds one request; nothing outlives it.

It may import `common`, `model` and `autoencoders`.
"""
