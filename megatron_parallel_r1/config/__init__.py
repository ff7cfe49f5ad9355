"""Recipes: typed settings, validated once when a file is read."""
