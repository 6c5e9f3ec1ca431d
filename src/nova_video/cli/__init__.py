"""The command line: each module parses one group of commands, calls the library and prints.

It may import every package; no package imports it.
"""
