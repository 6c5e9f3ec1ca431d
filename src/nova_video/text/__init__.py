"""Words to features: text encoders through transformers."""
