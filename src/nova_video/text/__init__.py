"""Text encoders in one home: found, loaded through transformers, and called. Prompts become features.

It may import `common` and `io`.
"""
