"""Exact judges: they read what a clip shows, and count how often it is right.

It may import `rendering`.
"""
