"""pgolf: the best language model that fits in 16,000,000 bytes after 600 seconds of training."""

__version__ = "0.1.0"
