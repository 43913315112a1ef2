"""Stages of a recipe: each takes the model state of the one before and adds its own files and report rows."""
