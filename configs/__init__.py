"""Shipped configuration files, found by `--config NAME` from any folder."""
