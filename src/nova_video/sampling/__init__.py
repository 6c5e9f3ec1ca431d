"""From conditioning to latents, frame by frame and set by set.

`state.py` is what one request holds, `generate.py` the loop over frames and sets, `diffusion.py` the denoising of one
set, `guidance.py` how passes are combined, `random.py` the order of random numbers. Nothing is kept between requests.
"""
