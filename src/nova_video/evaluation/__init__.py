"""Pipeline -> scores, one benchmark per module."""
