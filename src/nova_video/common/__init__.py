"""Small things that every other package uses: errors, checks of values, devices, options, optional packages, start-up.

It imports no other package.
"""
