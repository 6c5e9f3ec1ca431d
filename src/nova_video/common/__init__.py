"""Small things that every other package uses: errors, checks of values, devices, optional packages, start-up.

It imports no other package of nova_video.
"""
