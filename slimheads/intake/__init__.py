"""Checks of a checkpoint's JSON files and configuration, made before transformers reads them."""
