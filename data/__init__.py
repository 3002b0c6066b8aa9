"""Prompt and picture data."""
